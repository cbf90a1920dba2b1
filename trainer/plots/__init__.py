"""Figures that evaluations and reports share."""
