"""Tar shards: their index, the order of their samples, reading, loading and writing."""
