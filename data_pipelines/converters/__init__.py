"""One converter for each public layout of data, to tar shards."""
