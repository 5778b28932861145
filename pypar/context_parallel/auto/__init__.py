"""Which method is expected to be the fastest: bytes, seconds, and measured rates."""
