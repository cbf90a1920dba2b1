"""Proposals for a run file: a batch that suits the shards, and a complete run file from a few measured steps."""
