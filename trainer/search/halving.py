"""Which trials go on from a rung: asynchronous successive halving (Li et al. 2020, arXiv 1810.05934, algorithm 2).

A trial that has come to a rung is compared with all that have been there, and goes on if it is in the best of 1 in
`reduction` of them: nobody waits for others. As in Optuna's SuccessiveHalvingPruner the best one so far goes on while
they are too few; that one knows a single objective, though, and forgets what it has said where a search is killed.
With two objectives results are ordered by how many others dominate them (Fonseca, Fleming 1993), so that
whatever is on the Pareto front of its rung goes on (as Schmucker et al. 2021, arXiv 2106.12639).
"""

from __future__ import annotations

from collections.abc import Sequence

Scores = tuple[float, ...]
"""Of a trial at a rung, each to be minimised."""


def dominates(one: Scores, other: Scores) -> bool:
    """Whether one is nowhere worse than another, and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def goes_on(mine: Scores, others: Sequence[Scores], reduction: int) -> bool:
    """Whether a trial goes on from a rung where others have been."""
    everybody = [mine, *others]
    ranks = [sum(dominates(one, each) for one in everybody) for each in everybody]
    return sum(rank < ranks[0] for rank in ranks) < max(len(everybody) // reduction, 1)


def pareto_front(points: Sequence[Scores]) -> list[int]:
    """Return the places of points that no other dominates, by their first score."""
    front = [n for n, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    return sorted(front, key=lambda n: points[n])
