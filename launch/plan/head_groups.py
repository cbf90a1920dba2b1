"""Whether heads should live on some ranks alone: what a step costs with all heads everywhere, and in groups by task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydrazero.launch.plan.collectives import cost, links_of
from hydrazero.launch.plan.scaling import Stepper
from hydrazero.trainer.cost.step_cost import ModelSize, StepCost
from hydrazero.trainer.cost.traffic import Run, step_messages


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A step with the heads in one place or another."""

    compute: float
    """s."""
    communication: float
    """s."""
    bytes: float
    """That a rank sends in a step."""
    states: float
    """Bytes of weights, gradients, optimizer on a die, without activations."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.communication


def placements(stepper: Stepper, one_head: StepCost, ranks: int, micro_batches: int) -> dict[str, Placement]:
    """Return a step with stacked heads everywhere, and with groups of ranks by task that have one head each.

    In groups the encoder's gradients are summed over all ranks, a head's over its group; under the run's ZeRO stage.
    `one_head` is the cost of a step whose atoms go through one head. Fewer ranks than tasks make no groups.
    """
    run, tasks = stepper.run, stepper.run.tasks
    nothing = (0,) * len(run.size.groups)
    one = tuple(count // tasks for count in run.size.head_groups)
    encoder = replace(run, size=ModelSize(encoder_groups=run.size.encoder_groups, head_groups=nothing))
    head = replace(run, size=ModelSize(encoder_groups=nothing, head_groups=one), balance_every=0)
    group = ranks // tasks
    time = stepper.time(ranks, micro_batches)
    whole_sent, _ = _sum(stepper, run, ranks, micro_batches, own=True)
    everywhere = Placement(
        compute=time.compute + time.optimizer,
        communication=time.communication,
        bytes=whole_sent,
        states=_states(run.size.parameters, run.stage, run.master_bytes, ranks),
    )
    if not group:
        return {"everywhere": everywhere}
    sent, seconds = _sum(stepper, encoder, ranks, micro_batches, own=True)
    head_sent, head_seconds = _sum(stepper, head, group, micro_batches, own=False)
    in_groups = replace(stepper, cost=one_head, run=encoder).time(ranks, micro_batches)
    return {
        "everywhere": everywhere,
        "groups": Placement(
            compute=in_groups.compute + in_groups.optimizer,
            communication=seconds + head_seconds,
            bytes=sent + head_sent,
            states=_states(run.size.encoder, run.stage, run.master_bytes, ranks)
            + _states(head.size.heads, run.stage, run.master_bytes, group),
        ),
    }


def _sum(stepper: Stepper, run: Run, ranks: int, micro_batches: int, *, own: bool) -> tuple[float, float]:
    """Bytes that a rank sends and seconds that it takes; without what is the package's `own`, weights and gradients."""
    links = links_of(stepper.site, ranks)
    sent, seconds = 0.0, 0.0
    for message in step_messages(run.with_micro_batches(micro_batches), ranks):
        if own or message.of in ("weights", "gradients"):
            each = cost(message, links)
            sent += message.count * (each.node_bytes + each.network_bytes)
            seconds += message.count * each.seconds
    return sent, seconds


def _states(parameters: int, stage: int, number: int, ranks: int) -> float:
    """Weights, gradients, two moments, and the optimizer's own weights under ZeRO."""
    if stage == 0:
        return 4.0 * number * parameters
    return number * parameters * (2 + 4 / ranks)
