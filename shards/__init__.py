"""Structures, their sources, shards, stream and batches: the data side, without models or training."""
