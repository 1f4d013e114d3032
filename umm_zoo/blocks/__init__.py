"""Blocks that methods are composed of, each the choice for one slot of a method and swappable in an experiment file."""
