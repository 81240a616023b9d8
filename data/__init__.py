"""Shards in, batches out, in an exact order."""
