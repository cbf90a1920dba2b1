"""The position in the stream as part of a checkpoint: that of every lane, and those before the lanes changed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hydrazero.shards.errors import ConfigError
from hydrazero.shards.stream.deal import Deal, LanePlace, TaskPlan, lane_number


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Position of a lane after its last batch."""

    epoch: int = 0
    delivered: tuple[int, ...] = ()
    """Number of structures of each task that have been drawn in the epoch; empty at its start."""
    pending: tuple[tuple[int, int, int], ...] = ()
    """Places (task, block, row) of structures that have been drawn and wait for a batch."""

    @property
    def place(self) -> LanePlace:
        """Place from which the lane continues."""
        return LanePlace(epoch=self.epoch, delivered=list(self.delivered))


Lanes = tuple[LaneState, ...]
"""States of all lanes, by lane number."""


@dataclass(frozen=True, kw_only=True)
class StreamStart:
    """Start of the streams of all ranks."""

    deal: Deal
    lanes: Lanes
    turns: tuple[int, ...]
    """Worker of each rank whose batch comes next."""
    past: tuple[Lanes, ...]
    """States of all lanes at the end of each earlier deal, the oldest first; empty once their epoch is over."""


def start_of_stream(
    tasks: Sequence[TaskPlan], seed: int, ranks: int, workers: int, saved: dict[str, Any] | None
) -> StreamStart:
    """Return the start of streams with `ranks` times `workers` lanes, from a result of `saved_state` or from scratch.

    If the number of lanes has changed, the rest of the epoch is dealt again: each structure goes to one new lane.
    """
    try:
        lanes, turns, past = _parsed(saved)
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"the checkpoint's position in the data cannot be read ({error!r}).") from error
    if saved and (len(lanes), len(turns)) != (ranks * workers, ranks):
        past, lanes = (*past, lanes), ()
    rest, pending = None, []
    for before in past:
        rest = Deal(tasks, lanes=len(before), seed=seed, rest=rest).rest([lane.place for lane in before])
        pending = [item for lane in before for item in lane.pending]
    deal = Deal(tasks, lanes=ranks * workers, seed=seed, rest=rest)
    if not lanes:
        epoch = 0 if rest is None else rest.epoch
        shares = [tuple(pending[lane :: deal.lanes]) for lane in range(deal.lanes)]
        lanes, turns = tuple(LaneState(epoch=epoch, pending=share) for share in shares), (0,) * ranks
    return StreamStart(deal=deal, lanes=lanes, turns=turns, past=past)


def _parsed(saved: dict[str, Any] | None) -> tuple[Lanes, tuple[int, ...], tuple[Lanes, ...]]:
    if not saved:
        return (), (), ()
    states = [_of_rank(state) if isinstance(state, bytes) else state for state in saved["ranks"]]
    of_ranks = [_lanes(state["lanes"]) for state in states]
    ranks, workers = len(of_ranks), len(of_ranks[0])
    by_number = {lane_number(r, w, ranks): of_ranks[r][w] for r in range(ranks) for w in range(workers)}
    lanes = tuple(by_number[number] for number in range(ranks * workers))
    past = tuple(_lanes(before) for before in saved["past"])
    if past and min(lane.epoch for lane in lanes) > max(lane.epoch for lane in past[-1]):
        past = ()
    return lanes, tuple(state["turn"] for state in states), past


def _lanes(documents: Sequence[dict[str, Any]]) -> Lanes:
    return tuple(
        LaneState(
            epoch=document["epoch"],
            delivered=tuple(document["delivered"]),
            pending=tuple((task, block, row) for task, block, row in document["pending"]),
        )
        for document in documents
    )


def rank_state(lanes: Sequence[LaneState], turn: int) -> bytes:
    """Return the state of one rank for `saved_state`, as JSON.

    As bytes, 16,384 of them are gathered and saved in a second or two; `torch.save` takes a minute for the millions of
    numbers in them.
    """
    document = {"turn": turn, "lanes": [asdict(lane) for lane in lanes]}
    return json.dumps(document, separators=(",", ":"), default=int).encode()


class _PlainUnpickler(pickle.Unpickler):
    """Reads the pickles of plain types that earlier versions wrote; any class or function in one is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError: dicts, lists and numbers need no class."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _of_rank(state: bytes) -> dict[str, Any]:
    """Return the content of a `rank_state`; raise ConfigError if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(state) if state[:1] == b"{" else _PlainUnpickler(io.BytesIO(state)).load()
    except (ValueError, pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the checkpoint's position in the data cannot be read ({error}).") from error
    return found


def saved_state(fingerprint: str, past: tuple[Lanes, ...], of_ranks: Sequence[bytes]) -> dict[str, Any]:
    """Return the state of the stream for a checkpoint: what all ranks share, and the `rank_state` of each rank."""
    return {
        "fingerprint": fingerprint,
        "past": [[asdict(lane) for lane in lanes] for lanes in past],
        "ranks": list(of_ranks),
    }


def check_fingerprint(saved: dict[str, Any] | None, fingerprint: str) -> None:
    """Raise ConfigError if a saved position belongs to other data, another seed or another mixture."""
    if saved and saved.get("fingerprint") != fingerprint:
        raise ConfigError(
            "the checkpoint's position in the data belongs to other shards, another run.seed or another "
            "data.temperature; resume with the same ones, or start a new run."
        )
