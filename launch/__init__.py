"""Example run files and conversion settings."""
