"""Evaluate a run: errors per task, parity samples, tables, and the exported model."""
