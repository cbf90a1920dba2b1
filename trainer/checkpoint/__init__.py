"""Checkpoints: saving, loading, resharding, and models read from them."""
