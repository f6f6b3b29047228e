"""One pipeline stage as a DeepSpeed PipelineModule.

There is one LayerSpec a segment of the model. A spec owns that segment's parameters, so DeepSpeed sees an ordinary
layer list that can be cut anywhere; the work itself is one replay of Hugging Face's forward over all segments of the
stage, so `forward` is overridden. A parameter that several segments use sits in a TiedLayerSpec in front of each of
them: DeepSpeed then keeps its copies equal over the stages. Parameters on the meta device belong to other stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from transformers import PreTrainedModel

from llmpipe_cli.engine.weight_gradients import WeightGradients
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.replay import StageReplay
from llmpipe_cli.plan.plan import Layout

Carry = tuple[torch.Tensor, ...]


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
        model: this stage's skeleton; the parameters of segments ``bounds[stage]`` up to ``bounds[stage + 1]`` are
            real, all others are on meta.
        slice_plan: how the model is cut into segments.
        bounds: first segment of each stage and, last, the number of segments.
        layout: pipeline x tensor x data.
        split_backward: let weight gradients of linear layers be computed apart from those of their inputs.

    Attributes:
        weight_gradients: the postponed weight gradients; none without `split_backward`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slice_plan: SlicePlan,
        bounds: list[int],
        layout: Layout,
        *,
        split_backward: bool = False,
    ) -> None:
        self.bounds = bounds
        self.slice_plan = slice_plan
        self._segment_at: list[int] = []  # the segment that each spec belongs to
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        specs = self._specs(model, slice_plan)
        super().__init__(layers=specs, topology=topology)
        first, last = bounds[self.stage_id], bounds[self.stage_id + 1]
        self.parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Before the replay, which wraps the forwards it finds.
        self.weight_gradients = WeightGradients(model) if split_backward else None
        # Kept out of nn.Module's registry: parameters of other stages must not become parameters of this one.
        object.__setattr__(self, "skeleton", model)
        object.__setattr__(self, "replay", StageReplay(model, slice_plan, first, last))

    def forward(self, carry: Carry | None, inputs: dict[str, torch.Tensor]) -> Any:
        """Run this stage for one micro-batch.

        Args:
            carry: what the previous stage sent; none on the first stage.
            inputs: the micro-batch, the same on every stage.

        Returns:
            The tensors to send on, or the model's own output on the last stage.
        """
        return self.replay(carry, inputs)

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
        for segment, names in enumerate(own):
            for users, shared in tied.items():
                if segment in users:
                    specs.append(_tied_spec(users, {name: parameters[name] for name in shared}))
                    self._segment_at.append(segment)
            specs.append(LayerSpec(SegmentParameters, {name: parameters[name] for name in names}))
            self._segment_at.append(segment)
        return specs

    def _partition_layers(self, method: str = "plan") -> None:
        """Cut where the plan says instead of by one of DeepSpeed's methods."""
        self.parts = [
            next((index for index, segment in enumerate(self._segment_at) if segment >= bound), len(self._segment_at))
            for bound in self.bounds
        ]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


def _tied_spec(users: tuple[int, ...], parameters: dict[str, nn.Parameter]) -> TiedLayerSpec:
    attributes = [name.replace(".", "/") for name in parameters]
    key = "tie-" + "-".join(map(str, users))
    return TiedLayerSpec(key, SegmentParameters, parameters, tied_weight_attr=attributes, forward_fn=_pass_through)


_pass_through: Callable[[nn.Module, Carry], Carry] = lambda module, carry: carry  # noqa: E731
