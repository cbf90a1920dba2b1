"""Figures for evaluations and reports."""
