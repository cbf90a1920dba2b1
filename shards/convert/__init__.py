"""Conversion: source files become shards."""
