"""Which files are sources, and in which format they are."""
