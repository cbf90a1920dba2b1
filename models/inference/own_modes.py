"""The modes of PyTorch in which models predict, whatever modes the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute without the caller's inference mode, in which nothing can be differentiated, and without its autocast.

    Autocast would round the gradients that are the forces to bfloat16.
    """
    with torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
