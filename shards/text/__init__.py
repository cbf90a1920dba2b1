"""Texts that others may have written: names that become files, and what is shown on terminals, in plots and pages."""
