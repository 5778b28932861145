"""Where transformers meets pypar: its attention interface, its models under `shard_context`, its weights."""
