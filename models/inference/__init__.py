"""Exported models and the interfaces through which they are used."""
