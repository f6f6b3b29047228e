"""Generation over pipeline stages against transformers' own `generate` on the same files."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_models import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llmpipe_cli.cli.generate import minimal_recipe
from llmpipe_cli.cli.models import warn_of_drawn_weights
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.run import RunDirectory, read_metrics
from llmpipe_cli.worker.sampling import Picker, Sampling

PROMPTS = ["a long prompt beyond the window", "short", "two words", "x", "another one", "the sixth prompt"]
NEW_TOKENS = 20
TYPES = {
    "llama": {},
    "gpt2": {},
    "t5": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "bart": {"tie_word_embeddings": False},
    "mamba": {},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generation")


def _characters() -> PreTrainedTokenizerFast:
    """One token a character, so that texts can be compared instead of ids."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *string.digits, " "]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _model(folder: Path, model_type: str, scale: float = 4.0) -> Path:
    """A tiny random model with a tokenizer; large weights, so that its texts have some variety."""
    path = folder / f"{model_type}-{scale}"
    if not path.exists():
        task = "translation" if model_type in ("t5", "bart") else "causal-lm"
        changes = {"n_positions" if model_type == "gpt2" else "max_position_embeddings": 128}
        config = tiny_config(model_type, task, vocab_size=67, **TYPES[model_type])
        for name, value in changes.items():
            if hasattr(config, name):
                setattr(config, name, value)
        model = tiny_model(config, task, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(scale)
        model.save_pretrained(path)
        _characters().save_pretrained(path)
    return path


def _run(
    folder: Path, pool: RankPool, model: Path, stages: int, sampling: Any = None, tensor: int = 1, **options: Any
) -> RunDirectory:
    settings = {"max_new_tokens": NEW_TOKENS, "num_beams": options.pop("num_beams", 1)}
    settings["use_cache"] = options.pop("use_cache", True)
    options = {"prompts": PROMPTS, "tokenizer": str(model), "settings": settings, "sampling": sampling or {}, **options}
    recipe = minimal_recipe(model, "fp32", stages, options.pop("batch_size", 3), tensor)
    plan = make_plan(recipe, None, job="generate", device="cpu", num_devices=4, options=options)
    run = RunDirectory.create(folder / "runs", plan.name)
    plan.save(run.plan)
    pool.run_well(run, stages * tensor)
    return run


def _texts(run: RunDirectory) -> list[str]:
    lines = [json.loads(line) for line in run.generations.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return [line["text"] for line in lines]


def _expected(model: Path, prompts: list[str] = PROMPTS, together: bool = True, **options: Any) -> list[str]:
    """What transformers writes, all prompts in one batch padded as it wants, or one by one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    is_encoder_decoder = config.get("is_encoder_decoder", False)
    cls = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    reference = cls.from_pretrained(model).eval()
    tokenizer.padding_side = "right" if is_encoder_decoder else "left"
    texts = []
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        inputs = tokenizer(group, return_tensors="pt", padding=True, return_token_type_ids=False)
        found = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, pad_token_id=0, **options)
        start = 1 if is_encoder_decoder else inputs["input_ids"].shape[1]
        texts += tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "mistral", "gemma2"])
def test_greedy_text_is_that_of_transformers(model_type: str, stages: int, folder: Path, pool: RankPool) -> None:
    """Prompts of unequal length in several batches; prompts longer than the sliding window."""
    model = _model(folder, model_type)
    run = _run(folder, pool, model, stages)
    expected = _expected(model, do_sample=False)
    assert len(set(expected)) > 3
    assert max(map(len, expected)) > 8
    assert _texts(run) == expected


@pytest.mark.parametrize(("model_type", "stages"), [("t5", 2), ("bart", 2), ("bart", 3)])
def test_beam_search_is_that_of_transformers(model_type: str, stages: int, folder: Path, pool: RankPool) -> None:
    model = _model(folder, model_type, scale=2.0)
    run = _run(folder, pool, model, stages, num_beams=3)
    expected = _expected(model, do_sample=False, num_beams=3)
    assert expected != _expected(model, do_sample=False)
    assert _texts(run) == expected


@pytest.mark.parametrize(
    ("model_type", "stages", "tensor", "num_beams"),
    [
        ("llama", 1, 4, 1),
        ("gpt2", 1, 2, 1),
        ("gemma2", 2, 2, 1),
        ("mistral", 2, 2, 1),
        ("t5", 2, 2, 1),
        ("bart", 2, 2, 3),
    ],
)
def test_tensor_shards_write_the_text_of_transformers(
    model_type: str, stages: int, tensor: int, num_beams: int, folder: Path, pool: RankPool
) -> None:
    """Each shard caches its own heads, or the key heads that its queries share; with stages, two batches in flight."""
    model = _model(folder, model_type, scale=2.0 if num_beams > 1 else 4.0)
    run = _run(folder, pool, model, stages, tensor=tensor, num_beams=num_beams)
    assert _texts(run) == _expected(model, do_sample=False, num_beams=num_beams)


def test_a_token_costs_one_tokens_compute(folder: Path, pool: RankPool) -> None:
    """With a cache the stages see each prompt once and then every new token but the last once."""
    model, prompts = _model(folder, "mistral"), ["several words", "other letters"]
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = AutoTokenizer.from_pretrained(model)(prompts, return_tensors="pt")["input_ids"]
    num_new = (
        reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0).shape[1] - ids.shape[1]
    )
    assert num_new > 5
    computed = {}
    for use_cache in (True, False):
        run = _run(folder, pool, model, 2, prompts=prompts, use_cache=use_cache)
        computed[use_cache] = read_metrics(run.metrics)[-1]["num_computed_tokens"]
        assert _texts(run) == _expected(model, prompts, do_sample=False)
    assert computed[True] == 2 * (ids.shape[1] + num_new - 1)
    assert computed[False] == 2 * sum(ids.shape[1] + step for step in range(num_new))


def test_states_that_cannot_be_cut_are_computed_again(folder: Path, pool: RankPool) -> None:
    """A state-space model over two stages: right, with a note; only prompts of one length share a batch."""
    model = _model(folder, "mamba")
    run = _run(folder, pool, model, 2)
    assert _texts(run) == _expected(model, together=False, do_sample=False)
    notes = [line["message"] for line in read_metrics(run.metrics) if line.get("event") == "warning"]
    assert len(notes) == 1
    assert "mamba" in notes[0]


def test_repetition_penalty_and_stop(folder: Path, pool: RankPool) -> None:
    model = _model(folder, "llama")
    penalised = _expected(model, do_sample=False, repetition_penalty=1.8)
    assert penalised != _expected(model, do_sample=False)
    stop = penalised[0][4:6]
    run = _run(folder, pool, model, 2, sampling={"repetition_penalty": 1.8}, stop=[stop])
    assert _texts(run) == [text.split(stop)[0] for text in penalised]
    plan = Plan.load(run.plan)
    asked = RunDirectory.create(folder / "runs", plan.name)
    plan.save(asked.plan)
    asked.request_stop()
    assert pool.run(asked, 2) == [75, 75]
    assert 0 < len(asked.generations.read_text().splitlines()) < len(PROMPTS)


def test_sampling_depends_on_the_seed_and_neither_on_layout_nor_batch(folder: Path, pool: RankPool) -> None:
    model = _model(folder, "llama")
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}
    drawn = _texts(_run(folder, pool, model, 1, sampling))
    assert _texts(_run(folder, pool, model, 3, sampling, batch_size=2)) == drawn
    assert _texts(_run(folder, pool, model, 2, {**sampling, "seed": 2})) != drawn
    assert _texts(_run(folder, pool, model, 2, {**sampling, "top_k": 1})) == _expected(model, do_sample=False)


def test_weights_that_no_file_has_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was trained to find answers has no output layer to write with."""

    def told(model: PreTrainedModel) -> str:
        model.save_pretrained(tmp_path)
        plan = make_plan(
            minimal_recipe(tmp_path, "fp32", 1), None, job="generate", device="cpu", num_devices=1, checkpoint=tmp_path
        )
        capsys.readouterr()
        warn_of_drawn_weights(plan)
        return capsys.readouterr().err

    assert "cls.predictions" in told(tiny_model(tiny_config("bert", "question-answering"), "question-answering"))
    assert told(tiny_model(tiny_config("bert", "causal-lm"), "causal-lm")) == ""


def test_draws_follow_the_scores() -> None:
    """30,000 draws of three tokens against their probabilities; impossible tokens never come."""
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    scores = probabilities.log().expand(30_000, 4)
    tokens = Picker(Sampling(temperature=1.0, seed=5), range(30_000))(scores, 3)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=0.01)
    assert shares[1] == 0
