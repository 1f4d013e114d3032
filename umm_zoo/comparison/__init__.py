"""Comparison of blocks under one recipe: the plan (what runs, and that nothing else differs) and the results (intervals, plot)."""
