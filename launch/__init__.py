"""The command line, job scripts, plans of large runs, example run files and conversion settings."""
