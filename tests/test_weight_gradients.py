"""Postponed weight gradients equal autograd's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from llmpipe_cli.engine.weight_gradients import WeightGradients


class _Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(inputs)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        Conv1D(12, 8),
        nn.GELU(),
        nn.Linear(12, 8, bias=False),
        _Scaled(8, 8),
        nn.Linear(8, 4),
    )
    model[4].weight.requires_grad_(False)
    return model


def _input(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_autograd(direct: bool, recompute: bool) -> None:
    model, plain = _model(), _model()
    postponed = WeightGradients(model)
    postponed.direct = direct
    assert postponed.num_layers == 3  # neither the frozen one nor the subclass
    waiting = []
    for seed in (1, 2):  # two micro-batches, whose gradients add up
        ours, theirs = _input(seed), _input(seed)
        output = checkpoint(model, ours, use_reentrant=False) if recompute else model(ours)
        output.square().sum().backward()
        plain(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        waiting.append(postponed.take())
    early = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert early == {"1.weight", "1.bias", "5.weight", "5.bias"}
    for pending in waiting:
        postponed.compute(pending)
        assert not pending, "activations are let go"
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_computed_at_once(recompute: bool) -> None:
    """Nothing waits; the second micro-batch adds to what the first one made."""
    model, plain = _model(), _model()
    weight_gradients = WeightGradients(model)
    weight_gradients.direct = weight_gradients.at_once = True
    for seed in (1, 2):
        ours, theirs = _input(seed), _input(seed)
        output = checkpoint(model, ours, use_reentrant=False) if recompute else model(ours)
        output.square().sum().backward()
        plain(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert not weight_gradients.take()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_hooks_keep_gradients_waiting() -> None:
    """Without `direct` accumulation needs a backward pass of its own."""
    model = nn.Sequential(nn.Linear(8, 8))
    weight_gradients = WeightGradients(model)
    weight_gradients.at_once = True
    model(_input(0)).sum().backward()
    assert model[0].weight.grad is None
    weight_gradients.compute(weight_gradients.take())
    assert model[0].weight.grad is not None


def test_hooks_on_accumulation_run() -> None:
    """Mixed-precision optimizers take gradients over in such hooks."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    postponed, seen = WeightGradients(model), []
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    model(_input(0)).sum().backward()
    assert not seen
    postponed.compute(postponed.take())
    assert len(seen) == 1
    assert seen[0].abs().sum() > 0


def test_an_input_without_gradient_and_evaluation_take_the_plain_way() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    postponed = WeightGradients(model)
    inputs = _input(0).detach()
    model(inputs).sum().backward()
    plain(inputs).sum().backward()
    assert not postponed.take()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    with torch.no_grad():
        model(_input(1))
    assert not postponed.take()


def test_a_layer_used_twice_in_a_micro_batch() -> None:
    for direct in (False, True):
        shared = nn.Linear(8, 8)
        plain = copy.deepcopy(shared)
        postponed = WeightGradients(nn.Sequential(shared))
        postponed.direct = direct
        shared(shared(_input(0))).square().sum().backward()
        plain(plain(_input(0))).square().sum().backward()
        postponed.compute(postponed.take())
        torch.testing.assert_close(shared.weight.grad, plain.weight.grad)
        torch.testing.assert_close(shared.bias.grad, plain.bias.grad)
