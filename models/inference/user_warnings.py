"""Warnings that point to the line of the user's code, whatever lies between it and the function that warns."""

from __future__ import annotations

import sys
import warnings

PASSED_OVER = {"hydrazero", "ase", "contextlib", "threading", "torch", "torch_sim"}
"""Packages through which a call of the user reaches a calculator or a potential."""


class ModelWarning(UserWarning):
    """Something that the user of a model should know; commands show it without the line of code."""


def warn_user(text: str, category: type[ModelWarning] = ModelWarning) -> None:
    """Give a warning at the innermost line of code that belongs neither to this package nor to those that call it.

    The depth of that line varies: ASE calls a calculator from optimizers, dynamics and `get_potential_energy`.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
