"""Benchmarks of finished runs."""
