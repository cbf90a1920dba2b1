"""Dry runs and profiles: a few steps of a run, without the run itself."""
