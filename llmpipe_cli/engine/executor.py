"""Runs a schedule on one stage: forward and backward passes of micro-batches, with the transfers around them.

Every rank holds the inputs of all its replica's micro-batches, so only activations and their gradients travel. A
forward pass takes the carried tensors from the previous stage, replays this stage and starts sending the result; a
backward pass takes the gradients of what was sent, runs autograd once over all outputs and starts sending the
gradients of what was received. Schedules that split the backward pass run its second half, the weight gradients of
linear layers, as an instruction of its own.

What each instruction took is recorded (`engine.recorder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llmpipe_cli.engine.module import Carry, StageModule
from llmpipe_cli.engine.randomness import DrawSeeder
from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.engine.schedules import Instruction
from llmpipe_cli.engine.transfers import Receiver, Sender, batch_key
from llmpipe_cli.engine.weight_gradients import Pending, WeightGradients

OutputFunction = Callable[[int, Any], None]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one micro-batch.

    Attributes:
        index: position in the global batch, over all replicas.
        inputs: keyword arguments of the model's forward, the same on every stage.
        num_targets: tokens or samples that the model's loss is the mean over.
    """

    index: int
    inputs: dict[str, torch.Tensor]
    num_targets: int


LossFunction = Callable[[Any, MicroBatch], torch.Tensor]


class StageExecutor:
    """Executes instructions for the stage of this rank.

    Args:
        module: the stage.
        device: device of this rank.
        seeder: seeds dropout by micro-batch; none for a model that draws nothing.

    Attributes:
        recorder: when each instruction waited and worked.
    """

    def __init__(self, module: StageModule, device: torch.device, seeder: DrawSeeder | None = None) -> None:
        self.module, self.device = module, device
        self.recorder = Recorder()
        grid, stage = module.mpu(), module.stage_id
        self.is_first, self.is_last = stage == 0, stage == module.num_stages - 1
        self._seeder = seeder
        module.replay.seed_fn = seeder
        self._inputs: dict[int, Carry] = {}  # received tensors of micro-batches whose backward pass is to come
        self._outputs: dict[int, Any] = {}  # what they became
        self._weight_gradients: WeightGradients | None = module.weight_gradients
        self._postponed: dict[int, Pending] = {}  # weight gradients of micro-batches, to be computed
        # One communicator a direction; made by all ranks together.
        forward_group, backward_group = dist.new_group(), dist.new_group()
        plan, bounds = module.slice_plan, module.bounds
        self._gradient_free_in = set() if self.is_first else plan.gradient_free(bounds[stage])
        self._gradient_free_out = set() if self.is_last else plan.gradient_free(bounds[stage + 1])
        if not self.is_first:
            peer = grid.stage_to_global(stage_id=stage - 1)
            num_carried = plan.num_carried(bounds[stage])
            self._activations_in = Receiver(peer, forward_group, device, num_carried)
            self._gradients_out = Sender(peer, backward_group, device)
        if not self.is_last:
            peer = grid.stage_to_global(stage_id=stage + 1)
            self._activations_out = Sender(peer, forward_group, device)
            self._gradients_in = Receiver(peer, backward_group, device)

    def run(
        self,
        instructions: Sequence[Instruction],
        batches: Sequence[MicroBatch],
        *,
        step: int = 0,
        loss_function: LossFunction | None = None,
        scale_loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor] | None = None,
        on_output: OutputFunction | None = None,
    ) -> None:
        """Run all instructions.

        Args:
            instructions: forward and backward passes in this stage's order.
            batches: the replica's micro-batches, in order.
            step: optimizer step, for randomness.
            loss_function: last stage, before a backward pass: the loss from the model's output and its micro-batch.
            scale_loss: last stage: what to call backward on, from the loss and its micro-batch.
            on_output: last stage: receives the position of each micro-batch and its detached loss (training) or the
                model's output (forward only).
        """
        if not self.is_first:
            for position in (instruction.micro_batch for instruction in instructions if instruction.kind == "F"):
                self._activations_in.announce(batch_key(batches[position].inputs))
        training = any(instruction.kind != "F" for instruction in instructions)
        if not training:
            self.recorder.restart()
        for kind, position in instructions:
            self.recorder.begin(kind, position)
            if kind == "F":
                self._forward(position, batches[position], step, training, loss_function, scale_loss, on_output)
            elif kind == "W":
                self._compute_weight_gradients(position)
            else:
                self._backward(position)
                if kind == "B":
                    self._compute_weight_gradients(position)
            self.recorder.end()
        self.recorder.begin("send")
        for sender in self._senders():
            sender.finish()
        self.recorder.end()

    def _forward(
        self,
        position: int,
        batch: MicroBatch,
        step: int,
        training: bool,
        loss_function: LossFunction | None,
        scale_loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor] | None,
        on_output: OutputFunction | None,
    ) -> None:
        carry = None if self.is_first else tuple(self._activations_in.receive())
        self.recorder.arrived()
        if carry is not None and training:
            for index in self._with_gradient(carry, self._gradient_free_in):
                carry[index].requires_grad_()
        if self._seeder is not None:
            self._seeder.set_position(step, batch.index)
        output = self.module(carry, batch.inputs)
        if not self.is_last:
            self._activations_out.send(output, batch_key(batch.inputs))
            if training:
                expected = self._with_gradient(output, self._gradient_free_out)
                self._gradients_in.announce(None, [(output[i].dtype, tuple(output[i].shape)) for i in expected])
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
            self._inputs[position] = carry or ()
            self._outputs[position] = output

    def _backward(self, position: int) -> None:
        carry, output = self._inputs.pop(position), self._outputs.pop(position)
        gradients = None if self.is_last else self._gradients_in.receive()
        self.recorder.arrived()
        if gradients is None:
            output.backward()
        else:
            pairs = zip(self._with_gradient(output, self._gradient_free_out), gradients, strict=True)
            kept = [(output[index], gradient) for index, gradient in pairs if output[index].requires_grad]
            if kept:
                torch.autograd.backward([tensor for tensor, _ in kept], [gradient for _, gradient in kept])
        if carry:
            sent = [carry[index] for index in self._with_gradient(carry, self._gradient_free_in)]
            self._gradients_out.send([torch.zeros_like(t) if t.grad is None else t.grad for t in sent], None)
        if self._weight_gradients is not None:
            self._postponed[position] = self._weight_gradients.take()

    def _compute_weight_gradients(self, position: int) -> None:
        if self._weight_gradients is not None:
            self._weight_gradients.compute(self._postponed.pop(position))

    @staticmethod
    def _with_gradient(tensors: Carry, gradient_free: set[int]) -> list[int]:
        """Positions whose gradient travels back; both ends of a boundary derive the same ones."""
        return [i for i, tensor in enumerate(tensors) if tensor.is_floating_point() and i not in gradient_free]

    def _senders(self) -> Iterable[Sender]:
        if not self.is_last:
            yield self._activations_out
        if not self.is_first:
            yield self._gradients_out
