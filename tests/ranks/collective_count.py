"""Count of the bytes of all collectives: the functions of torch.distributed are wrapped before others import them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

MESSAGES = {
    "all_reduce": lambda args, kwargs: _of(args, kwargs, 0, "tensor"),
    "broadcast": lambda args, kwargs: _of(args, kwargs, 0, "tensor"),
    "reduce": lambda args, kwargs: _of(args, kwargs, 0, "tensor"),
    "all_gather": lambda args, kwargs: _of(args, kwargs, 0, "tensor_list"),
    "all_gather_into_tensor": lambda args, kwargs: _of(args, kwargs, 0, "output_tensor"),
    "reduce_scatter": lambda args, kwargs: _of(args, kwargs, 1, "input_list"),
    "reduce_scatter_tensor": lambda args, kwargs: _of(args, kwargs, 1, "input"),
    "barrier": lambda args, kwargs: [],
}
"""Function per collective that returns the complete message: the output of a gather, the input of a scatter."""


def _of(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> list[Tensor]:
    found = args[place] if len(args) > place else kwargs[name]
    return list(found) if isinstance(found, list | tuple) else [found]


class Collectives:
    """Count the calls and bytes of each collective since the last `reset`."""

    def __init__(self) -> None:
        self.reset()
        for name, message in MESSAGES.items():
            wrapped = self._wrapped(name, getattr(distributed_c10d, name), message)
            setattr(distributed_c10d, name, wrapped)
            setattr(dist, name, wrapped)

    def reset(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.messages: list[tuple[str, int]] = []

    def _wrapped(self, name: str, function: Callable[..., Any], message: Callable[..., list[Tensor]]) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            size = sum(tensor.numel() * tensor.element_size() for tensor in message(args, kwargs))
            self.calls[name] += 1
            self.bytes[name] += size
            self.messages.append((name, size))
            return function(*args, **kwargs)

        return counted
