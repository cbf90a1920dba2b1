"""Formats of single programs: FitSNAP and aenet."""
