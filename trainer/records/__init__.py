"""Records of a run: its log, metrics, files, and what run.json says of it."""
