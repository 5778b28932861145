"""Attention of a model as it is, taken over by `shard_context` while it runs."""
