"""Runs a schedule on one stage: forward and backward passes of micro-batches, with the transfers around them.

Every rank holds the inputs of all its replica's micro-batches, so only activations and their gradients travel. A
forward pass takes the carried tensors from the part of the model before, replays its own part and starts sending the
result; a backward pass takes the gradients of what was sent, runs autograd once over all outputs and starts sending the
gradients of what was received. Schedules that split the backward pass run its second half, the weight gradients of
linear layers, as an instruction of its own. A stage of several chunks has such ends for each of them.

What each instruction took is recorded (`engine.recorder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmpipe_cli.engine.communicators import open_connections, transfer_group
from llmpipe_cli.engine.device_clock import clock_of
from llmpipe_cli.engine.module import Carry, StageModule
from llmpipe_cli.engine.randomness import DrawSeeder
from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.engine.schedules import Instruction
from llmpipe_cli.engine.transfers import Handover, Receiver, Sender, batch_key
from llmpipe_cli.engine.weight_gradients import Pending, WeightGradients

OutputFunction = Callable[[int, Any], None]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one micro-batch.

    Attributes:
        index: position in the global batch, over all replicas.
        inputs: keyword arguments of the model's forward, the same on every stage.
        num_targets: tokens or samples that the model's loss is the mean over.
        num_tokens: tokens that are not padding; counted for training only.
    """

    index: int
    inputs: dict[str, torch.Tensor]
    num_targets: int
    num_tokens: int = 0


@dataclass(frozen=True)
class Loss:
    """Loss of one micro-batch on the last stage.

    Attributes:
        mean: over the micro-batch's targets, in nats; without auxiliary losses.
        auxiliary_term: what the model adds to it for its routers, coefficients included; none if it adds nothing.
        auxiliary: the sum of those losses before their coefficients, without gradient.
    """

    mean: torch.Tensor
    auxiliary_term: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None

    def detach(self) -> Loss:
        """The numbers alone."""
        return Loss(self.mean.detach(), auxiliary=self.auxiliary)


LossFunction = Callable[[Any, MicroBatch], Loss]
ScaleFunction = Callable[[Loss, MicroBatch], torch.Tensor]


Key = tuple[int, int]  # chunk and micro-batch


@dataclass(frozen=True)
class _Chunk:
    """The ends of one part of the model: where its tensors come from and where they go, none at the model's ends.

    `gradient_free_in` and `gradient_free_out` are positions in the carry for which no gradient comes back.
    """

    activations_in: Receiver | Handover | None = None
    gradients_out: Sender | Handover | None = None
    activations_out: Sender | Handover | None = None
    gradients_in: Receiver | Handover | None = None
    gradient_free_in: frozenset[int] = frozenset()
    gradient_free_out: frozenset[int] = frozenset()


class StageExecutor:
    """Executes instructions for the stage of this rank.

    Args:
        module: the stage.
        device: device of this rank.
        seeder: seeds dropout by micro-batch; none for a model that draws nothing.
        wire: what fp32 tensors travel as between stages, if not as they are.

    Attributes:
        recorder: when each instruction waited and worked.
        peak_activations: the most micro-batches whose activations were alive at once so far; of several
            chunks each counts for itself.
    """

    def __init__(
        self,
        module: StageModule,
        device: torch.device,
        seeder: DrawSeeder | None = None,
        wire: torch.dtype | None = None,
    ) -> None:
        self.module, self.device = module, device
        self.recorder = Recorder(clock_of(device))
        self.peak_activations = 0
        self._seeder = seeder
        for replay in module.replays:
            replay.seed_fn = seeder
        self._inputs: dict[Key, Carry] = {}  # received tensors of micro-batches whose backward pass is to come
        self._outputs: dict[Key, Any] = {}  # what they became
        self._weight_gradients: WeightGradients | None = module.weight_gradients
        self._postponed: dict[Key, Pending] = {}  # weight gradients of micro-batches, to be computed
        self._chunks = _connect(module, device, wire)

    def run(
        self,
        instructions: Sequence[Instruction],
        batches: Sequence[MicroBatch],
        *,
        step: int = 0,
        loss_function: LossFunction | None = None,
        scale_loss: ScaleFunction | None = None,
        on_output: OutputFunction | None = None,
    ) -> None:
        """Run all instructions.

        Args:
            instructions: forward and backward passes in this stage's order.
            batches: the replica's micro-batches, in order.
            step: optimizer step, for randomness.
            loss_function: last part, before a backward pass: the loss from the model's output and its micro-batch.
            scale_loss: last part: what to call backward on, from the loss and its micro-batch.
            on_output: last part: receives the position of each micro-batch and its detached loss (training) or the
                model's output (forward only).
        """
        training = any(instruction.kind != "F" for instruction in instructions)
        for kind, position, chunk in instructions:
            incoming = self._chunks[chunk].activations_in
            if kind == "F" and incoming is not None:
                incoming.announce(batch_key(batches[position].inputs))
        if not training:
            self.recorder.restart()
        for kind, position, chunk in instructions:
            self.recorder.begin(kind, position, chunk)
            if kind == "F":
                self._forward(chunk, position, batches[position], step, training, loss_function, scale_loss, on_output)
            elif kind == "W":
                self._compute_weight_gradients((chunk, position))
            else:
                self._backward((chunk, position), whole=kind == "B")
                if kind == "B":
                    self._compute_weight_gradients((chunk, position))
            self.recorder.end()
        self.recorder.begin("send")
        for ends in self._chunks:
            for sender in (ends.activations_out, ends.gradients_out):
                if sender is not None:
                    sender.finish()
        self.recorder.end()

    def _forward(
        self,
        chunk: int,
        position: int,
        batch: MicroBatch,
        step: int,
        training: bool,
        loss_function: LossFunction | None,
        scale_loss: ScaleFunction | None,
        on_output: OutputFunction | None,
    ) -> None:
        ends = self._chunks[chunk]
        carry = tuple(ends.activations_in.receive()) if ends.activations_in is not None else None
        self.recorder.arrived()
        if carry is not None and training:
            for index in self._with_gradient(carry, ends.gradient_free_in):
                carry[index].requires_grad_()
        if self._seeder is not None:
            self._seeder.set_position(step, batch.index)
        output = self.module(carry, batch.inputs, chunk)
        if ends.activations_out is not None:
            ends.activations_out.send(output, batch_key(batch.inputs))
            if training:
                assert ends.gradients_in is not None
                expected = self._with_gradient(output, ends.gradient_free_out)
                ends.gradients_in.announce(None, [(output[i].dtype, tuple(output[i].shape)) for i in expected])
        elif training:
            assert loss_function is not None
            assert scale_loss is not None
            loss = loss_function(output, batch)
            output = scale_loss(loss, batch)
            if on_output is not None:
                on_output(position, loss.detach())
        elif on_output is not None:
            on_output(position, output)
        if training:
            self._inputs[chunk, position] = carry or ()
            self._outputs[chunk, position] = output
            self.peak_activations = max(self.peak_activations, len(self._outputs) + len(self._postponed))

    def _backward(self, key: Key, whole: bool) -> None:
        """The gradients of a micro-batch's inputs, and with `whole` those of the weights where that can be at once."""
        ends = self._chunks[key[0]]
        if self._weight_gradients is not None:
            self._weight_gradients.at_once = whole
        carry, output = self._inputs.pop(key), self._outputs.pop(key)
        gradients = ends.gradients_in.receive() if ends.gradients_in is not None else None
        self.recorder.arrived()
        if gradients is None:
            output.backward()
        else:
            pairs = zip(self._with_gradient(output, ends.gradient_free_out), gradients, strict=True)
            kept = [(output[index], gradient) for index, gradient in pairs if output[index].requires_grad]
            if kept:
                torch.autograd.backward([tensor for tensor, _ in kept], [gradient for _, gradient in kept])
        if carry:
            assert ends.gradients_out is not None
            sent = [carry[index] for index in self._with_gradient(carry, ends.gradient_free_in)]
            ends.gradients_out.send([torch.zeros_like(t) if t.grad is None else t.grad for t in sent], None)
        if self._weight_gradients is not None:
            self._postponed[key] = self._weight_gradients.take()

    def _compute_weight_gradients(self, key: Key) -> None:
        if self._weight_gradients is not None:
            self._weight_gradients.compute(self._postponed.pop(key))

    @staticmethod
    def _with_gradient(tensors: Carry, gradient_free: frozenset[int]) -> list[int]:
        """Positions whose gradient travels back; both ends of a boundary derive the same ones."""
        return [i for i, tensor in enumerate(tensors) if tensor.is_floating_point() and i not in gradient_free]


def _connect(module: StageModule, device: torch.device, wire: torch.dtype | None) -> list[_Chunk]:
    """The ends of this stage's chunks, and the communicators they need; all ranks call this together.

    There is a communicator for each direction of each lane (`Placement.lanes`), so that each carries the messages of
    neighbouring parts in one direction and in one order, and a rank sends to one other in it or receives from one.
    """
    placement, plan, bounds, grid = module.placement, module.slice_plan, module.bounds, module.mpu()
    owners = [placement.owner(part) for part in range(placement.num_parts)]
    lanes = placement.lanes()
    groups = {lane: (transfer_group(), transfer_group()) for lane in sorted(set(lanes.values()))}
    connections = []
    for part, lane in lanes.items():
        before, after = owners[part - 1][0], owners[part][0]
        if module.stage_id in (before, after):
            is_before = module.stage_id == before
            peer = grid.stage_to_global(stage_id=after if is_before else before)
            activations, gradients = groups[lane]
            connections += [(activations, peer, is_before), (gradients, peer, not is_before)]
    open_connections(connections, device)
    handovers: dict[int, tuple[Handover, Handover]] = {}  # by the boundary's later part
    chunks = []
    for chunk in range(placement.num_chunks):
        part = placement.part(module.stage_id, chunk)
        ends: dict[str, Any] = {}
        if part:
            stage = owners[part - 1][0]
            ends["gradient_free_in"] = frozenset(plan.gradient_free(bounds[part]))
            if stage == module.stage_id:
                ends["activations_in"], ends["gradients_out"] = handovers.setdefault(part, (Handover(), Handover()))
            else:
                activations, gradients = groups[lanes[part]]
                peer = grid.stage_to_global(stage_id=stage)
                ends["activations_in"] = Receiver(peer, activations, device, plan.num_carried(bounds[part]), wire=wire)
                ends["gradients_out"] = Sender(peer, gradients, device, wire)
        if part + 1 < placement.num_parts:
            stage = owners[part + 1][0]
            ends["gradient_free_out"] = frozenset(plan.gradient_free(bounds[part + 1]))
            if stage == module.stage_id:
                handover = handovers.setdefault(part + 1, (Handover(), Handover()))
                ends["activations_out"], ends["gradients_in"] = handover
            else:
                activations, gradients = groups[lanes[part + 1]]
                peer = grid.stage_to_global(stage_id=stage)
                ends["activations_out"] = Sender(peer, activations, device, wire)
                ends["gradients_in"] = Receiver(peer, gradients, device, wire=wire)
        chunks.append(_Chunk(**ends))
    return chunks
