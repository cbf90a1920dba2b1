"""Promotion of trials by asynchronous successive halving (Li et al. 2020, arXiv 1810.05934, algorithm 2).

A trial that reaches a rung is compared with all trials that have reached it so far. It is promoted if it is among the
best 1 in `reduction` of them, so that no trial waits for others; while there are fewer, the best one is promoted.
Optuna's SuccessiveHalvingPruner does the same, but only for one objective, and it loses its decisions if a search is
killed. With two objectives, results are ordered by the number of others that dominate them (Fonseca, Fleming 1993), so
that all trials on the Pareto front of a rung are promoted (as in Schmucker et al. 2021, arXiv 2106.12639).
"""

from __future__ import annotations

from collections.abc import Sequence

Scores = tuple[float, ...]
"""Objectives of a trial at a rung, all of which are minimised."""


def dominates(one: Scores, other: Scores) -> bool:
    """Return whether the first scores are nowhere worse than the others, and better in at least one."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def is_promoted(mine: Scores, others: Sequence[Scores], reduction: int) -> bool:
    """Return whether a trial with scores `mine` is promoted from a rung that trials with scores `others` reached."""
    everybody = [mine, *others]
    ranks = [sum(dominates(one, each) for one in everybody) for each in everybody]
    return sum(rank < ranks[0] for rank in ranks) < max(len(everybody) // reduction, 1)


def pareto_front(points: Sequence[Scores]) -> list[int]:
    """Return the indices of the points that no other dominates, ordered by their first score."""
    front = [n for n, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    return sorted(front, key=lambda n: points[n])
