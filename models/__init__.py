"""Encoders, heads, exported models, and the interfaces through which models are used."""

from hydrazero.models.inference.model_file import read_card, save_model
from hydrazero.models.inference.potential import Potential, load_model

__all__ = ["Potential", "load_model", "read_card", "save_model"]
