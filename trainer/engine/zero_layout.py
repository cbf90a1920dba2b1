"""Where DeepSpeed keeps weights, gradients and moments: the one place that knows what its ZeRO does not document.

The optimizer steps master weights: the model's own without ZeRO, otherwise the share of them that belongs to this rank.
Where the model's weights are in lower precision they are roundings of the master weights. DeepSpeed's own functions
return float32 alone, whatever the precision. Its files are read by `checkpoint/zero_files.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydrazero.trainer.engine.partition import ParameterPlace, Partition
from hydrazero.trainer.engine.training_engine import TrainingEngine
from hydrazero.trainer.ranks.distributed import rank, ranks

STATE_KEYS = ("base_optimizer_state", "optimizer_state_dict")
"""Key of the state of the optimizer inside ZeRO's: under ZeRO 1 and 2, and under ZeRO 3."""


def layout_of(engine: TrainingEngine) -> ZeroLayout:
    """Return the layout of an engine's weights."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return ZeroLayout(engine)
    if stage == 3:
        return PartitionedParameters(engine)
    # DeepSpeed has another optimizer, with other names, for bf16 under ZeRO 1.
    return Bf16FlatGroups(engine) if hasattr(engine.optimizer, "bf16_groups_flat") else FlatGroups(engine)


def full_size(parameter: Tensor) -> int:
    """Return the number of elements of a parameter, of which this rank may hold a part under ZeRO 3."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class ZeroLayout:
    """Weights of an engine without ZeRO: in full on every rank. The other layouts override this one."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine, self.optimizer = engine, engine.optimizer

    def master_weights(self) -> list[Tensor]:
        """Return the tensors that this rank's optimizer steps, in the order of the optimizer's state."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update_model(self) -> None:
        """Give the model the present values of the master weights; called on every rank."""

    def full_weight(self, parameter: Any) -> Tensor:
        """Return all of a parameter in the precision of the master weights; called on every rank."""
        full: Tensor = parameter.detach().clone()
        return full

    @torch.no_grad()
    def set_full_weight(self, parameter: Any, value: Tensor) -> None:
        """Set this rank's share of a parameter among the master weights; `update_model` gives it to the model."""
        parameter.copy_(value)

    def partition(self) -> Partition:
        """Return how the parameters are partitioned over ranks."""
        places, shares = self._places({id(p): name for name, p in self.engine.module.named_parameters()})
        return Partition(
            stage=int(self.engine.zero_optimization_stage()),
            ranks=ranks(),
            precision=str(next(self.engine.module.parameters()).dtype).removeprefix("torch."),
            places=places,
            shares=shares,
        )

    def _places(self, names: dict[int, str]) -> tuple[dict[str, ParameterPlace], tuple[int, ...]]:
        """Return the place of each trained parameter, and the shares of `Partition`; names are by id of parameter."""
        flats = enumerate(self.master_weights())
        return {names[id(p)]: ParameterPlace(flat=flat, start=0, size=p.numel()) for flat, p in flats}, ()

    def load_state(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Set the optimizer's state by flat tensor, and the settings of its groups of parameters.

        Afterwards the model has the present values of the master weights. Called on every rank.
        """
        document = self.optimizer.state_dict()
        _fill_state(document, state, groups)
        self.optimizer.load_state_dict(document)

    @torch.no_grad()
    def set_untrained(self, tensor: Tensor, value: Tensor) -> None:
        """Set a parameter that is not trained, or a buffer; called on every rank."""
        tensor.copy_(value)

    def release_gathered(self) -> None:
        """Release the small parameters that DeepSpeed has gathered after saving or loading under ZeRO 3.

        They are then as at the start of a run: in its first steps DeepSpeed notes which parameters are gathered when,
        misses those that are gathered already, and fails where it needs them later.
        """

    def takes_gradients(self) -> bool:
        """Return whether gradients of a whole step can be handed over by `take_gradients`, without a backward pass."""
        return True

    @torch.no_grad()
    def take_gradients(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Use gradients of all trained parameters, times a factor and averaged over ranks, in the engine's next step.

        This does what DeepSpeed does for one parameter after the other in a backward pass. Called on every rank, for
        steps of one micro-batch.
        """
        # Products are copies: a graph may return one tensor for two parameters, and clipping is in place.
        products = torch._foreach_mul([gradient.contiguous() for gradient in gradients], factor)
        for parameter, product in zip(self._trained(), products, strict=True):
            parameter.grad = product
        if ranks() > 1:
            engine: Any = self.engine
            engine.allreduce_gradients()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]

    def discard_gradients(self) -> None:
        """Discard the gradients of a step that was skipped."""

    def loss_scaler(self) -> Any | None:
        """Return the object that adapts the scale of the loss in fp16; None where the scale is fixed or absent."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return scaler if self.engine.fp16_enabled() and getattr(scaler, "dynamic", False) else None

    @contextlib.contextmanager
    def writing_with(self, attempt: Callable[[Callable[[], object]], None]) -> Iterator[None]:
        """Let DeepSpeed write each file of a checkpoint through `attempt`, which may keep errors to itself.

        Otherwise a rank that cannot write a file would leave the others waiting for ever.
        """
        engine: Any = self.engine
        writer = engine.checkpoint_engine
        save, copy_script = writer.save, engine._copy_recovery_script
        writer.save = lambda state_dict, path: attempt(lambda: save(state_dict, path))
        # DeepSpeed's script makes one file of weights out of its own; `hydrazero export` does that here.
        engine._copy_recovery_script = lambda path: None
        try:
            yield
        finally:
            writer.save, engine._copy_recovery_script = save, copy_script

    @contextlib.contextmanager
    def reading_with(self, load: Callable[[str, Any], object]) -> Iterator[None]:
        """Let DeepSpeed read each file of a checkpoint through `load`, given its path and the device of the tensors.

        DeepSpeed itself would run whatever code a file contains.
        """
        engine: Any = self.engine
        reader = engine.checkpoint_engine
        before = reader.load
        reader.load = lambda path, map_location=None: load(path, map_location)
        try:
            yield
        finally:
            reader.load = before


class FlatGroups(ZeroLayout):
    """ZeRO 1 and 2: all parameters of a group in one flat tensor, of which each rank holds a share."""

    def master_weights(self) -> list[Tensor]:
        """Return this rank's share of each flat tensor."""
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _model_flats(self) -> list[Tensor]:
        """Return the flat tensors of which the model's parameters are views."""
        return list(self.optimizer.bit16_groups_flat)

    @torch.no_grad()
    def update_model(self) -> None:
        """Round each share, and gather the shares of all ranks."""
        self.optimizer.update_lp_params()

    @torch.no_grad()
    def full_weight(self, parameter: Any) -> Tensor:
        """Add up the parts of all ranks, each with zeros elsewhere."""
        full = torch.zeros(parameter.numel(), dtype=self.master_weights()[0].dtype, device=parameter.device)
        mapping = parameter._hp_mapping  # describes the part that this rank steps; None if there is none
        if mapping is not None:
            part = mapping.lp_fragment_address
            full[part.start : part.start + part.numel] = mapping.get_hp_fragment().detach()
        dist.all_reduce(full)
        return full.view(parameter.shape)

    @torch.no_grad()
    def set_full_weight(self, parameter: Any, value: Tensor) -> None:
        """Set the part that this rank steps."""
        parameter.set_full_hp_param(value)

    def _places(self, names: dict[int, str]) -> tuple[dict[str, ParameterPlace], tuple[int, ...]]:
        flats, places = self._model_flats(), {}
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                flat, start = _inside(parameter, flats)
                places[name] = ParameterPlace(flat=flat, start=start, size=parameter.numel())
        return places, tuple(flat.numel() // ranks() for flat in flats)

    def load_state(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Give the state to the optimizer inside ZeRO's."""
        document = _inner_state(self.optimizer.state_dict())
        _fill_state(document, state, groups)
        self.optimizer.optimizer.load_state_dict(document)
        self.optimizer.update_lp_params()

    def takes_gradients(self) -> bool:
        """Return whether DeepSpeed would do no more with the gradients than to average and partition them."""
        engine, optimizer, flats = self.engine, self.optimizer, self._model_flats()
        if engine.zero_optimization_stage() != 1 or optimizer.cpu_offload:
            return False
        follow = all(not any(paddings) for paddings in optimizer.round_robin_bit16_padding)
        in_full = engine.communication_data_type == flats[0].dtype
        return follow and in_full and isinstance(optimizer.optimizer, torch.optim.Adam)

    @torch.no_grad()
    def take_gradients(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Average all gradients in one flat tensor, and give the optimizer its share of each group."""
        found, parts = dict(zip(self._trained(), gradients, strict=True)), []
        flats = self._model_flats()
        for group, flat in zip(self.optimizer.round_robin_bit16_groups, flats, strict=True):
            parts += [found[parameter].reshape(-1) for parameter in group]
            parts.append(flat.new_zeros(flat.numel() - sum(parameter.numel() for parameter in group)))
        whole = torch.cat(parts).mul_(factor / ranks())
        if ranks() > 1:
            dist.all_reduce(whole)
        for number, of_flat in enumerate(whole.split([flat.numel() for flat in flats])):
            share = of_flat.numel() // ranks()
            self.optimizer.averaged_gradients[number] = [of_flat[rank() * share : (rank() + 1) * share]]

    def discard_gradients(self) -> None:
        """With offload, DeepSpeed would add the next step's gradients to those that it skipped."""
        held = getattr(self.optimizer, "averaged_gradients", {})
        held.update(dict.fromkeys(held))


class Bf16FlatGroups(FlatGroups):
    """ZeRO 1 in bf16: as `FlatGroups`, under other names."""

    def master_weights(self) -> list[Tensor]:
        """Return this rank's share of each flat tensor."""
        return list(self.optimizer.fp32_groups_flat_partition)

    def takes_gradients(self) -> bool:
        """Return False: DeepSpeed adds gradients of bf16 weights up in float32 first."""
        return False

    def _model_flats(self) -> list[Tensor]:
        return list(self.optimizer.bf16_groups_flat)


class PartitionedParameters(ZeroLayout):
    """ZeRO 3: every rank holds a part of every parameter, of its group's parameters one after the other."""

    def master_weights(self) -> list[Tensor]:
        """Return this rank's parts of all parameters, one flat tensor for each group."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def takes_gradients(self) -> bool:
        """Return False: steps are not compiled under ZeRO 3."""
        return False

    @torch.no_grad()
    def update_model(self) -> None:
        """Do what DeepSpeed does at the end of a step."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @torch.no_grad()
    def full_weight(self, parameter: Any) -> Tensor:
        """Join the parts of all ranks, the last of which are padded."""
        part = self.optimizer.get_local_fp32_param(parameter).reshape(-1)
        joined = part.new_empty(ranks() * part.numel())
        dist.all_gather_into_tensor(joined, part.contiguous())
        shape = parameter.ds_shape
        return joined[: shape.numel()].view(shape)

    @torch.no_grad()
    def set_full_weight(self, parameter: Any, value: Tensor) -> None:
        """Set this rank's part."""
        count = parameter.ds_tensor.numel()
        flat = value.new_zeros(ranks() * count)
        flat[: value.numel()] = value.reshape(-1)
        self.optimizer.set_local_hp_param(flat[rank() * count : (rank() + 1) * count], parameter)

    def _places(self, names: dict[int, str]) -> tuple[dict[str, ParameterPlace], tuple[int, ...]]:
        places = {}
        for flat, group in enumerate(self.optimizer.fp16_groups):
            start = 0
            for parameter in group:
                places[names[id(parameter)]] = ParameterPlace(flat=flat, start=start, size=full_size(parameter))
                start += parameter.ds_tensor.numel()
        return places, ()

    def load_state(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Give the state to ZeRO's optimizer, which takes the documents of all ranks."""
        document = self.optimizer.state_dict()
        _fill_state(_inner_state(document), state, groups)
        self.optimizer.load_state_dict({rank(): document})

    @torch.no_grad()
    def set_untrained(self, tensor: Tensor, value: Tensor) -> None:
        """Set a parameter on rank 0, from which the others get their parts, and a buffer on every rank."""
        import deepspeed

        if not hasattr(tensor, "ds_id"):
            tensor.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if rank() == 0:
                tensor.copy_(value)

    def release_gathered(self) -> None:
        """Partition all parameters."""
        self.optimizer.checkpoint_event_prologue()


def _inner_state(document: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the optimizer inside ZeRO's, out of the state of both."""
    inner: dict[str, Any] = next(document[key] for key in STATE_KEYS if key in document)
    return inner


def _fill_state(document: dict[str, Any], state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Put a state, and the settings of groups of parameters, into the document of an optimizer."""
    document["state"] = {number: values for number, values in state.items() if values}
    document["param_groups"] = [
        {**group, "params": own["params"]} for group, own in zip(groups, document["param_groups"], strict=True)
    ]


def _inside(parameter: nn.Parameter, flats: list[Tensor]) -> tuple[int, int]:
    """Return the number of the flat tensor that a parameter is a view of, and where it starts in it."""
    for number, flat in enumerate(flats):
        offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if offset >= 0 and offset + parameter.numel() <= flat.numel():
            return number, offset
    raise RuntimeError("a parameter lies in none of DeepSpeed's flat tensors.")
