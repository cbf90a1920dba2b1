"""What readers share about the parts of a structure: names, atomic numbers, cells, periodicity, stated units."""
