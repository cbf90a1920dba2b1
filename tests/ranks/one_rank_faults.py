"""Program of each rank in test_training.py: hydrazero.trainer.train with an error that only rank 1 meets."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from hydrazero.shards.errors import ShardError
from hydrazero.shards.graphs.graph import GraphBatch
from hydrazero.shards.stream.stream import TrainStream
from hydrazero.trainer import setup, train
from hydrazero.trainer.evaluation import validation


def fail(*_: object) -> None:
    raise ShardError("rank 1 cannot read its shard.")


def fail_at_the_first(*_: object) -> Iterator[None]:
    yield fail()


read = TrainStream.__iter__


def read_slowly(stream: TrainStream) -> Iterator[GraphBatch]:
    for batch in read(stream):
        time.sleep(1.0)
        yield batch


PLACES: dict[str, tuple[Any, str, Any]] = {
    "check": (setup, "check_weights", fail),
    "validation": (validation, "evaluation_batches", fail_at_the_first),
    "data": (TrainStream, "__iter__", read_slowly),
}


if __name__ == "__main__":
    module, name, fault = PLACES[sys.argv.pop()]
    if os.environ["RANK"] == "1":
        setattr(module, name, fault)
    train.main()
