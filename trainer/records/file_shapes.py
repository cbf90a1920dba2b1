"""What the JSON files of a run folder must hold, so that whoever reads them can rely on it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictBool, StrictFloat, StrictInt
from typing_extensions import TypeAliasType

from hydrazero.shards.text.names import FileName

RUN_NAME = "run.json"
"""File with the settings, versions, command and start of the run."""
MODEL_FACTS_NAME = "model.json"
"""File with the settings of the model and the facts of its tasks."""
EVALUATION_NAME = "evaluation.json"


Step = Annotated[int, Field(ge=0, le=2**53, strict=True)]
"""A step of a run, which plots can show."""


class RunTask(BaseModel):
    """A task in `run.json`."""

    name: FileName
    shards: str


class RunSteps(BaseModel):
    """The table `train` of `run.json`."""

    steps: PositiveInt


class ModelTable(BaseModel):
    """The table `model` of `run.json`."""

    encoder: str
    features: PositiveInt
    layers: PositiveInt
    cutoff: float


class LossTable(BaseModel):
    """The table `loss` of `run.json`."""

    forces_weight: float = 1.0
    stress_weight: float = 1.0
    final_weights: dict[str, float] = {}


class BalanceTable(BaseModel):
    """The table `balance` of `run.json`."""

    method: str = ""


class SamplingTable(BaseModel):
    """The table `data` of `run.json`."""

    temperature: float = 1.0


class Commit(BaseModel):
    """The commit of the work tree in which a run was started."""

    commit: str
    changed: bool


class Change(BaseModel):
    """A setting that a resume changed."""

    model_config = ConfigDict(extra="forbid")

    key: str
    old: Any
    new: Any


class Resume(BaseModel):
    """An entry of `resumes` in `run.json`."""

    step: Step
    steps: PositiveInt
    started: str = ""
    git: Commit | None = None
    changes: list[Change] = []


class RunRecordShape(BaseModel):
    """The content of `run.json`: the tables of the run file, and how the run was started."""

    tasks: Annotated[list[RunTask], Field(min_length=1)]
    train: RunSteps
    model: ModelTable
    loss: LossTable = LossTable()
    balance: BalanceTable = BalanceTable()
    data: SamplingTable = SamplingTable()
    batch: dict[str, int] = {}
    ranks: PositiveInt | None = None
    command: str
    started: str
    versions: dict[str, str]
    manifests: dict[str, str] = {}
    git: Commit | None = None
    resumes: list[Resume] = []
    run_id: str | None = None


class NamedTable(BaseModel):
    """A table that at least has a name."""

    name: str


class ModelFactsShape(BaseModel):
    """The content of `model.json`, whose values are checked where models are made from it."""

    settings: dict[str, Any]
    tasks: Annotated[list[NamedTable], Field(min_length=1)]


class EvaluationShape(BaseModel):
    """The content of `evaluation.json`, whose errors are checked by `Evaluation.from_json`."""

    split: str
    weights: str | None = None
    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


Numbers = TypeAliasType("Numbers", "StrictFloat | StrictInt | StrictBool | list[Numbers] | dict[str, Numbers] | None")
"""A number, or tables and lists of them."""


class MetricsRow(BaseModel):
    """A row of `metrics.jsonl`, whose other values are numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Numbers] = Field(init=False)

    step: Step
    kind: str
    split: str = ""


SHAPES: dict[str, Any] = {
    RUN_NAME: RunRecordShape,
    MODEL_FACTS_NAME: ModelFactsShape,
    EVALUATION_NAME: EvaluationShape,
}
"""File of a run folder -> type of its content."""
