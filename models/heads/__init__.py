"""Heads: stacked parameters, one slice per task, from features of atoms to labelled quantities."""
