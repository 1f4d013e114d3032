"""Checkpoints: their folder, their files, sharded ones, averaged weights."""
