"""Extended XYZ: the comment line, with whatever is said about cell and periodicity; text files; tar archives."""
