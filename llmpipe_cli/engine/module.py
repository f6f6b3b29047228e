"""One pipeline stage as a DeepSpeed PipelineModule.

There is one LayerSpec a segment of the model. A spec owns that segment's parameters, so DeepSpeed sees an ordinary
layer list that can be cut anywhere; the work itself is one replay of Hugging Face's forward over the segments of the
stage, or over those of each of its chunks, so `forward` is overridden. A parameter that several segments use sits in a
TiedLayerSpec in front of each of them: DeepSpeed then keeps its copies equal over the stages. Parameters on the meta
device belong to other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from transformers import PreTrainedModel

from llmpipe_cli.engine.schedules import Placement
from llmpipe_cli.engine.weight_gradients import WeightGradients
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.replay import StageReplay
from llmpipe_cli.model.tensor.apply import Division, install
from llmpipe_cli.model.tensor.collectives import TensorGroup
from llmpipe_cli.plan.plan import Layout

Carry = tuple[torch.Tensor, ...]


def stage_chunks(bounds: Sequence[int], placement: Placement, stage: int) -> list[range]:
    """The segments of each chunk of a stage."""
    parts = [placement.part(stage, chunk) for chunk in range(placement.num_chunks)]
    return [range(bounds[part], bounds[part + 1]) for part in parts]


class SegmentParameters(nn.Module):
    """Holds parameters of the model under their Hugging Face names ('.' written as '/')."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def forward(self, carry: Carry) -> Carry:
        """Not a computation of its own: the stage is replayed as a whole."""
        return carry


class StageModule(PipelineModule):
    """The stage of this rank.

    Args:
        model: this stage's skeleton; the parameters of its own segments are real, all others are on meta.
        slice_plan: how the model is cut into segments.
        bounds: first segment of each part and, last, the number of segments.
        layout: pipeline x tensor x data.
        placement: which stage holds which parts; by default each holds one.
        split_backward: let weight gradients of linear layers be computed apart from those of their inputs.
        division: what this tensor shard holds of the model; None without tensor shards.
        whole_logits: see `model.tensor.apply.install`.

    Attributes:
        chunks: the segments of each of this stage's parts.
        replays: what runs each of them.
        weight_gradients: the postponed weight gradients; none without `split_backward`.
        tensor_group: the tensor shards of this stage; none without them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slice_plan: SlicePlan,
        bounds: list[int],
        layout: Layout,
        *,
        placement: Placement | None = None,
        split_backward: bool = False,
        division: Division | None = None,
        whole_logits: bool = False,
    ) -> None:
        self.bounds = bounds
        self.placement = placement or Placement(layout.pipeline)
        self.slice_plan = slice_plan
        self._spec_bounds = [0]  # first spec of each stage
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        specs = self._specs(model, slice_plan)
        super().__init__(layers=specs, topology=topology)
        self.chunks = stage_chunks(bounds, self.placement, self.stage_id)
        self.parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Before the replay, which wraps the forwards it finds.
        self.weight_gradients = WeightGradients(model) if split_backward else None
        # Around the postponed weight gradients, which know nothing of other shards.
        self.tensor_group: TensorGroup | None = None
        if division is not None:
            self.tensor_group = TensorGroup(self.mpu().get_slice_parallel_group())
            install(model, division, self.tensor_group, whole_logits=whole_logits)
        # Kept out of nn.Module's registry: parameters of other stages must not become parameters of this one.
        object.__setattr__(self, "skeleton", model)
        replays = [StageReplay(model, slice_plan, chunk.start, chunk.stop) for chunk in self.chunks]
        object.__setattr__(self, "replays", replays)

    @property
    def segments(self) -> list[int]:
        """All segments of this stage."""
        return [segment for chunk in self.chunks for segment in chunk]

    def forward(self, carry: Carry | None, inputs: dict[str, torch.Tensor], chunk: int = 0) -> Any:
        """Run a chunk of this stage for one micro-batch.

        Args:
            carry: what the part before gave; none for the model's first part.
            inputs: the micro-batch, the same on every stage.
            chunk: which of the stage's parts to run.

        Returns:
            The tensors to hand on, or the model's own output from its last part.
        """
        return self.replays[chunk](carry, inputs)

    def train(self, mode: bool = True) -> StageModule:
        """Set training or evaluation mode, in the skeleton too."""
        super().train(mode)
        if "skeleton" in self.__dict__:
            self.skeleton.train(mode)
        return self

    def _specs(self, model: PreTrainedModel, slice_plan: SlicePlan) -> list[LayerSpec]:
        parameters = dict(model.named_parameters())
        own: list[list[str]] = [[] for _ in range(slice_plan.num_segments)]
        tied: dict[tuple[int, ...], list[str]] = {}
        for name, segments in slice_plan.owners.items():
            if len(segments) > 1:
                tied.setdefault(tuple(segments), []).append(name)
            else:
                own[segments[0]].append(name)
        specs: list[LayerSpec] = []
        for stage in range(self.placement.num_stages):
            for chunk in stage_chunks(self.bounds, self.placement, stage):
                for segment in chunk:
                    for users, shared in tied.items():
                        if segment in users:
                            specs.append(_tied_spec(users, {name: parameters[name] for name in shared}))
                    specs.append(LayerSpec(SegmentParameters, {name: parameters[name] for name in own[segment]}))
            self._spec_bounds.append(len(specs))
        return specs

    def _partition_layers(self, method: str = "plan") -> None:
        """Cut where the plan says instead of by one of DeepSpeed's methods; a stage's chunks stand side by side."""
        self.parts = self._spec_bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


def _tied_spec(users: tuple[int, ...], parameters: dict[str, nn.Parameter]) -> TiedLayerSpec:
    attributes = [name.replace(".", "/") for name in parameters]
    key = "tie-" + "-".join(map(str, users))
    return TiedLayerSpec(key, SegmentParameters, parameters, tied_weight_attr=attributes, forward_fn=_pass_through)


_pass_through: Callable[[nn.Module, Carry], Carry] = lambda module, carry: carry  # noqa: E731
