"""Mixtures of experts with the auxiliary loss of their routers: on every layout, and apart from the loss."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jobs import Job, final_weights, full_model, losses, steps, train_plain
from rank_pool import RankPool
from tiny_models import tiny_config, tiny_inputs, tiny_model

from llmpipe_cli.engine.executor import MicroBatch
from llmpipe_cli.engine.loss import make_loss

STDLIB = sysconfig.get_paths()["stdlib"]
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.0,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2-zb-h1": {"pipeline": 2, "schedule": "zb-h1"},
    "2x2-zero1-zb-v": {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "zb-v"},
    "3-checkpointing": {"pipeline": 3, "schedule": "1f1b", "activation_checkpointing": "full"},
    "2-interleaved-checkpointing": {"pipeline": 2, "schedule": "interleaved", "activation_checkpointing": "full"},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def _recipe(**config: Any) -> dict[str, Any]:
    return {
        "name": "experts",
        "task": "causal-lm",
        "model": {"config": {**MIXTRAL, **config}},
        "tokenizer": {"train": {"vocab_size": 300}},
        # one text a sample, so that micro-batches have different numbers of targets
        "data": {"train": {"files": f"{STDLIB}/json/*.py"}, "sequence_len": 48, "packing": False},
        "train": {
            "max_steps": 3,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
        },
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("experts"), _recipe())


@pytest.fixture(scope="module")
def reference(job: Job) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    return train_plain(job.plan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auxiliary_loss_over_layouts(job: Job, reference: Any, layout: str, pool: RankPool) -> None:
    plain_losses, plain_norms, plain_weights = reference
    run = job.train(pool, parallel=LAYOUTS[layout])
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
    weights = final_weights(run)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(weights[name], plain_weights[name], rtol=0, atol=1e-5)
    # each token chooses two of four experts, so the loss is near 2, and exactly that for perfect balance
    assert all(1.9 < line["aux_loss"] < 2.5 for line in steps(run))


def test_auxiliary_loss_changes_the_routers(job: Job, reference: Any) -> None:
    """The comparison above would see an auxiliary loss left out, or weighted by targets."""
    changed = Job(job.folder, _recipe(router_aux_loss_coef=0.0))
    _, norms, _ = train_plain(changed.plan())
    assert abs(norms[0] - reference[1][0]) > 1e-4 * norms[0]


def test_router_noise_is_the_same_on_every_layout(job: Job, pool: RankPool) -> None:
    noisy = Job(job.folder, _recipe(router_jitter_noise=0.3))
    one, three = (noisy.train(pool, parallel={"pipeline": stages}) for stages in (1, 3))
    assert losses(one) == pytest.approx(losses(three), rel=1e-6)
    assert full_model(noisy.plan()).config.router_jitter_noise == 0.3
    assert abs(losses(one)[0] - losses(job.train(pool, parallel={"pipeline": 1}))[0]) > 1e-5, "there was no noise"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_auxiliary_loss_is_taken_apart(label_smoothing: float) -> None:
    model = tiny_model(tiny_config("mixtral", output_router_logits=True, router_aux_loss_coef=0.3), "causal-lm")
    inputs = tiny_inputs("causal-lm")
    output = model(**inputs)
    loss = make_loss("causal-lm", label_smoothing)(output, MicroBatch(0, inputs, 5))
    logits, labels = output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.mean, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.auxiliary_term, 0.3 * output.aux_loss)
    torch.testing.assert_close(loss.auxiliary, output.aux_loss.detach())


def test_several_auxiliary_losses_are_taken_apart() -> None:
    """Switch Transformers has two kinds of them, with a coefficient each, for encoder and decoder."""
    changes = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    coefficients = {"router_z_loss_coef": 0.2, "router_aux_loss_coef": 0.3}
    model = tiny_model(tiny_config("switch_transformers", "translation", **changes, **coefficients), "translation")
    inputs = tiny_inputs("translation")
    output = model(**inputs, output_router_logits=True)
    loss = make_loss("translation", 0.0)(output, MicroBatch(0, inputs, 5))
    z_loss, aux_loss = output.encoder_z_loss + output.decoder_z_loss, output.encoder_aux_loss + output.decoder_aux_loss
    torch.testing.assert_close(loss.auxiliary_term, 0.2 * z_loss + 0.3 * aux_loss)
    torch.testing.assert_close(loss.auxiliary, (z_loss + aux_loss).detach())
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(loss.mean, expected, rtol=1e-5, atol=0)
