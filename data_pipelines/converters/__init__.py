"""Converters to tar shards, one for each public layout of data."""
