"""Neighbour lists, and batches of structures as graphs."""
