"""Extended XYZ: the comment line, with the cell and the periodicity; text files; tar archives."""
