"""Hyperparameter search: the space file, trials, and the journal that workers share."""
