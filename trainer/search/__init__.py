"""Searches for hyperparameters: what is varied, trials that are trained, a journal that workers share."""
