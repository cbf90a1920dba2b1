"""Property tests that also run for minutes: a few seeded examples in every run of the tests, many in `make fuzz`."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

HANG = 120
"""Seconds for one example, after which all stacks are printed and the process ends."""

_ANY_SIZE = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]


def few_examples(holds: Callable[[Any], None], strategy: SearchStrategy[Any], count: int) -> None:
    """Check that something holds for `count` examples, always the same ones."""
    options = settings(
        max_examples=count, derandomize=True, database=None, suppress_health_check=_ANY_SIZE, deadline=None
    )
    options(given(strategy)(lambda example: holds(example)))()


def examples_for(holds: Callable[[Any], None], strategy: SearchStrategy[Any], seconds: float) -> int:
    """Check that something holds for new examples until the time is over; return the number of examples.

    HYDRAZERO_FUZZ_SEED is the first seed, so that another number gives other examples.
    """
    end, count = time.monotonic() + seconds, 0

    def counted(example: Any) -> None:
        nonlocal count
        count += 1
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            holds(example)
        finally:
            faulthandler.cancel_dump_traceback_later()

    number = int(os.environ.get("HYDRAZERO_FUZZ_SEED", time.time_ns() % 2**31))
    phases = (Phase.generate, Phase.shrink)
    while time.monotonic() < end:
        options = settings(
            max_examples=50,
            database=None,
            suppress_health_check=_ANY_SIZE,
            deadline=None,
            phases=phases,
            print_blob=True,
            report_multiple_bugs=False,
        )
        seed(number)(options(given(strategy)(lambda example: counted(example))))()
        number += 1
    return count
