"""Data: worlds, converters, and the WebDataset shards that feed a method. umm_zoo never imports this package."""
