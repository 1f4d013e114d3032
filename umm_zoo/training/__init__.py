"""Training of an experiment: the trainer, the run folder, optimisers, sharding, signals, records."""
