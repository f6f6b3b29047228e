"""LoRA over real DeepSpeed ranks against peft in one process, and freezing by pattern against one plain process."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from jobs import Job, final_weights, full_model, losses, steps, train_plain
from rank_pool import RankPool
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.adapters import _KNOWN_TARGETS
from llmpipe_cli.model.merge import merge_adapter
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.run import RunDirectory

STDLIB = sysconfig.get_paths()["stdlib"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bert": {"model_type": "bert", **SMALL, "max_position_embeddings": 64},
    "albert": {"model_type": "albert", **SMALL, "embedding_size": 16, "max_position_embeddings": 64},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"pipeline": 1},
    "2": {"pipeline": 2},
    "3": {"pipeline": 3},
    "2x2": {"pipeline": 2, "data": 2, "zero_stage": 0},
    "2x2-zero1-zb-v": {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "zb-v"},
    "2-checkpointing": {"pipeline": 2, "activation_checkpointing": "full", "schedule": "interleaved"},
    "3-zb-h1": {"pipeline": 3, "schedule": "zb-h1"},
    "2x2-tensor": {"pipeline": 2, "tensor": 2, "schedule": "zb-h1"},
    "1x2x2-tensor": {"pipeline": 1, "tensor": 2, "data": 2, "zero_stage": 1},
}
# The embedding alone on the first stage and the head alone on the last: neither holds anything that learns.
BARE_ENDS = {"pipeline": 3, "partition": [1, 3, 1]}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def base_recipe(model: str, folder: Path) -> dict[str, Any]:
    """A recipe that trains `model`, whose pretrained weights it writes into `folder` first."""
    scratch: dict[str, Any] = {
        "name": model,
        "task": "causal-lm" if model in ("llama", "gpt2") else "masked-lm",
        "model": {"config": MODELS[model], "dropout": 0.0},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"train": {"files": f"{STDLIB}/json/*.py"}, "sequence_len": 32},
        "train": {
            "max_steps": 5,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.1,
        },
    }
    job = Job(folder, scratch)
    pretrained = folder / "pretrained"
    full_model(job.plan()).save_pretrained(pretrained)
    recipe = {**scratch, "model": {"from": str(pretrained), "dropout": 0.0}, "tokenizer": job.data.tokenizer_dir}
    if model in ("bert", "albert"):
        lines = [line.strip() for line in Path(STDLIB, "textwrap.py").read_text().splitlines()]
        rows = [
            {"text": line, "label": "comment" if line.startswith("#") else "code"} for line in lines if len(line) > 20
        ]
        (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe["task"] = "classification"
        recipe["data"] = {"train": {"files": str(folder / "lines.jsonl")}, "sequence_len": 32}
    return recipe


def lora_job(model: str, folder: Path, **lora: Any) -> Job:
    return Job(folder, {**base_recipe(model, folder), "lora": {"r": 4, "alpha": 8, **lora}})


def peft_model(plan: Plan) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """peft's own model with the weights that training starts from, and its trainable parameters by their file names."""
    assert plan.adapters is not None
    own = full_model(plan)
    cls = getattr(transformers, plan.model_class)
    base = cls.from_pretrained(plan.weights, config=own.config, dtype=torch.float32)
    names = ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "fan_in_fan_out")
    config = peft.LoraConfig(**{name: plan.adapters["config"][name] for name in names})
    model = peft.get_peft_model(base, config).train()
    trained = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", "")
        plain = plain.replace("modules_to_save.default.", "").replace(".default.", ".")
        with torch.no_grad():
            parameter.copy_(own.get_parameter(plain))
        if parameter.requires_grad:
            trained[plain] = parameter
    return model, trained


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Any]:
    job = lora_job(request.param, tmp_path_factory.mktemp(request.param))
    model, trained = peft_model(job.plan())
    plain_losses, norms, _ = train_plain(job.plan(), model)
    return job, (plain_losses, norms, {name: parameter.detach() for name, parameter in trained.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_peft(reference: tuple[Job, Any], layout: str, pool: RankPool) -> None:
    job, (plain_losses, plain_norms, plain_weights) = reference
    run = job.train(pool, parallel=LAYOUTS[layout])
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
    weights = adapter_of(run)
    assert weights.keys() == plain_weights.keys()
    for name, expected in plain_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5)
    assert any(weight.abs().max() > 1e-3 for name, weight in weights.items() if "lora_B" in name)
    assert plain_losses[-1] < plain_losses[0]


def adapter_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The adapter's tensors without peft's prefix."""
    state = load_file(run.checkpoints / "latest" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A LoRA training with dropout that saves after 2 of 4 steps."""
    job = lora_job("llama", tmp_path_factory.mktemp("lora"), dropout=0.1, target_modules="all-linear")
    job.values["train"]["max_steps"] = 4
    job.values["checkpoint"] = {"every_steps": 2}
    return job


@pytest.fixture(scope="module")
def trained(llama: Job, pool: RankPool) -> RunDirectory:
    return llama.train(pool, parallel=LAYOUTS["2"])


# Four shards share two key heads: each computes with some rows of whole projections.
FOUR_SHARDS = {"pipeline": 1, "tensor": 4}


@pytest.mark.parametrize(
    "parallel", [LAYOUTS["1"], LAYOUTS["2x2-zero1-zb-v"], BARE_ENDS, {**BARE_ENDS, "zero_stage": 1}, FOUR_SHARDS]
)
def test_dropout_and_stages_without_adapters(
    parallel: dict[str, Any], llama: Job, trained: RunDirectory, pool: RankPool
) -> None:
    run = llama.train(pool, parallel=parallel)
    assert losses(run) == pytest.approx(losses(trained), rel=1e-5)
    expected = adapter_of(trained)
    for name, weight in adapter_of(run).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    without = llama.train(pool, parallel={"pipeline": 1}, lora__dropout=0.0)
    assert abs(losses(without)[-1] - losses(trained)[-1]) > 1e-5, "dropout was not active"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(dtype: str, llama: Job, trained: RunDirectory, pool: RankPool) -> None:
    """Also on stages without anything that learns; the frozen weights stay in the model's dtype, without state."""
    layouts = [{"pipeline": 1}, BARE_ENDS, {"pipeline": 2, "data": 2}]
    runs = [llama.train(pool, parallel=parallel, model__dtype=dtype) for parallel in layouts]
    for run in runs:
        assert losses(run) == pytest.approx(losses(trained), rel=5e-3)
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)
        kinds = {weight.dtype for weight in adapter_of(run).values()}
        assert kinds == {torch.bfloat16 if dtype == "bf16" else torch.float16}


def test_checkpoint_holds_adapters_alone(llama: Job, trained: RunDirectory) -> None:
    checkpoint = trained.checkpoint(4)
    assert verify(checkpoint)["step"] == 4
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    names = set(adapter_of(trained))
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(names) == 2 * 3 * len(layers), "every linear layer but the head has A and B"
    state = set()
    for path in (checkpoint / "training").glob("optimizer-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            state |= {name.partition("|")[0] for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert state == names


def test_peft_opens_the_checkpoint(llama: Job, trained: RunDirectory, tmp_path: Path) -> None:
    """peft, transformers and the merged model give the logits of our own stage."""
    plan = llama.plan()
    assert plan.weights is not None
    checkpoint = trained.checkpoint(4)
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    own = full_model(llama.plan(job="evaluate", resume=checkpoint)).eval()
    base = AutoModelForCausalLM.from_pretrained(plan.weights)
    with torch.no_grad():
        expected = own(input_ids=ids).logits
        assert (base.eval()(input_ids=ids).logits - expected).abs().max() > 1e-2
        opened = peft.PeftModel.from_pretrained(base, str(checkpoint)).eval()
        assert torch.equal(opened(input_ids=ids).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint).eval()(input_ids=ids).logits, expected)
        merge_adapter(checkpoint, tmp_path / "merged", max_shard_bytes=60_000)
        merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    with pytest.raises(UsageError, match="not empty"):
        merge_adapter(checkpoint, tmp_path / "merged")
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_adapter(tmp_path / "merged", tmp_path / "other")


@pytest.mark.parametrize("layout", ["1", "2", "2x2-zero1-zb-v", "2x2-tensor"])
def test_resume(layout: str, llama: Job, trained: RunDirectory, pool: RankPool) -> None:
    resumed = llama.train(pool, resume=trained.checkpoint(2), parallel=LAYOUTS[layout])
    assert [line["step"] for line in steps(resumed)] == [3, 4]
    assert losses(resumed) == pytest.approx(losses(trained)[2:], rel=1e-5)
    expected = adapter_of(trained)
    for name, weight in adapter_of(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_adapters_are_trained_on_from_another_run(llama: Job, trained: RunDirectory, pool: RankPool) -> None:
    start = {"from": str(trained.checkpoint(4)), "dropout": 0.0}
    plan = llama.plan(model=start)
    assert plan.weights == llama.plan().weights
    assert full_model(plan).get_parameter("model.layers.0.mlp.up_proj.lora_B.weight").abs().max() > 0
    run = llama.train(pool, model=start, parallel=LAYOUTS["2"])
    assert losses(run)[0] < losses(trained)[0]


@pytest.mark.parametrize(
    ("lora", "where"),
    [
        ({"r": 8, "alpha": 8, "target_modules": "all-linear"}, "lora.r"),
        ({"r": 4, "alpha": 4, "target_modules": "all-linear"}, "lora.alpha"),
        ({"r": 4, "alpha": 8, "target_modules": ["q_proj"]}, "lora.target_modules"),
        ({"r": 4, "alpha": 8, "target_modules": "all-linear", "modules_to_save": ["norm"]}, "lora.modules_to_save"),
        (None, "lora"),
    ],
)
def test_other_adapters_do_not_go_on(lora: Any, where: str, llama: Job, trained: RunDirectory) -> None:
    with pytest.raises(UsageError) as caught:
        llama.plan(resume=trained.checkpoint(2), lora=lora)
    assert caught.value.where == where


def test_evaluation_of_an_adapter(llama: Job, trained: RunDirectory, pool: RankPool, tmp_path: Path) -> None:
    """The adapter's metrics are those of the merged model, and not those of its base."""
    values = {**llama.values, "data": {**llama.values["data"], "validation": {"files": f"{STDLIB}/html/__init__.py"}}}
    job = Job(tmp_path, values)
    merge_adapter(trained.checkpoint(4), tmp_path / "merged")
    results = []
    for model, parallel in ((trained.checkpoint(4), LAYOUTS["2"]), (tmp_path / "merged", LAYOUTS["1"])):
        plan = job.plan(job="evaluate", resume=model, parallel=parallel)
        run = job.start(plan)
        pool.run_well(run, plan.layout.num_ranks)
        results.append(json.loads(run.evaluation.read_text()))
    assert results[0]["checkpoint"] == str(trained.checkpoint(4))
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5)


def test_shared_layers(tmp_path: Path, pool: RankPool) -> None:
    """ALBERT calls one layer many times: its adapter is one parameter of several stages."""
    job = lora_job("albert", tmp_path, target_modules=["query", "ffn"])
    model, trained = peft_model(job.plan())
    plain_losses, _, _ = train_plain(job.plan(), model)
    for layout in ("1", "3"):
        run = job.train(pool, parallel=LAYOUTS[layout])
        assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
        weights = adapter_of(run)
        for name, expected in trained.items():
            torch.testing.assert_close(weights[name], expected.detach(), rtol=0, atol=1e-5)


def test_new_layers_are_saved(tmp_path: Path, pool: RankPool) -> None:
    """A base without pooler and classifier: both are new, so both are trained and saved, and peft finds them."""
    job = lora_job("bert", tmp_path)
    run = job.train(pool, parallel=LAYOUTS["2"])
    saved = {name for name in adapter_of(run) if "lora" not in name}
    layers = ("bert.pooler.dense", "classifier")
    assert saved == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    plan = job.plan(job="evaluate", resume=run.checkpoint(5))
    own = full_model(plan).eval()
    base = transformers.BertForSequenceClassification.from_pretrained(plan.weights, config=own.config)
    opened = peft.PeftModel.from_pretrained(base, str(run.checkpoint(5))).eval()
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, own(input_ids=ids).logits)
        merge_adapter(run.checkpoint(5), tmp_path / "merged")
        merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, own(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert set(merged.config.id2label.values()) == {"comment", "code"}


@pytest.mark.parametrize("model_type", sorted(_KNOWN_TARGETS))
def test_known_targets_are_those_of_peft(model_type: str) -> None:
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert list(_KNOWN_TARGETS[model_type]) == table[model_type]


def test_first_values(llama: Job) -> None:
    """A is drawn as peft draws it, by name alone; B is zero."""
    one, other = full_model(llama.plan()), full_model(llama.plan(parallel=LAYOUTS["2"]))
    drawn = []
    for name, parameter in one.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "lora_A" in name:
            assert torch.equal(parameter, other.get_parameter(name))
            drawn.append(parameter.detach().flatten() * parameter.shape[1] ** 0.5)
    values = torch.cat(drawn)
    assert values.abs().max() <= 1
    assert values.mean().abs() < 0.03
    assert values.std() == pytest.approx(3**-0.5, rel=0.03)
    assert len({float(part[0]) for part in drawn}) == len(drawn)


# -- freezing ----------------------------------------------------------------------------------------------------------

FROZEN: dict[str, dict[str, Any]] = {
    "first layers": {"freeze": ["model.embed_tokens", "model.layers.[01]"]},
    "last layer and head": {"freeze": ["*.layers.2", "model.norm", "lm_head"]},
    "norms alone": {"trainable": ["*layernorm*"]},
    "middle but its biases": {"trainable": ["model.layers.1"], "freeze": ["*.mlp"]},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(folder := tmp_path_factory.mktemp("freeze"), base_recipe("llama", folder))


@pytest.mark.parametrize("frozen", FROZEN)
def test_freezing_equals_one_process(frozen: str, whole: Job, pool: RankPool) -> None:
    train = {**whole.values["train"], **FROZEN[frozen]}
    plan = whole.plan(train=train)
    assert plan.trainable is not None
    before = {name: parameter.detach().clone() for name, parameter in full_model(plan).named_parameters()}
    plain_losses, plain_norms, expected = train_plain(plan)
    for layout in ({"pipeline": 1}, {"pipeline": 2, "zero_stage": 1}, {"pipeline": 4}, LAYOUTS["2x2"]):
        run = whole.train(pool, train=train, parallel=layout)
        assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
        assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
        for name, weight in final_weights(run).items():
            if name in plan.trainable:
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
                assert not torch.equal(weight, before[name])
            else:
                assert torch.equal(weight, before[name])


def test_frozen_tied_weights_in_bf16(tmp_path: Path, pool: RankPool) -> None:
    recipe = base_recipe("gpt2", tmp_path)
    recipe["train"]["freeze"] = ["lm_head", "transformer.h.2", "transformer.ln_f"]  # the head is the embedding's tie
    job = Job(tmp_path, recipe)
    assert "transformer.wte.weight" not in (job.plan().trainable or ())
    runs = [
        job.train(pool, parallel=parallel, model__dtype="bf16")
        for parallel in ({"pipeline": 1}, {"pipeline": 3, "partition": [1, 2, 2]}, {"pipeline": 2, "data": 2})
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("train", "where", "hint"),
    [
        ({"freeze": ["model.embed_token"]}, "train.freeze[0]", "did you mean model.embed_tokens?"),
        ({"trainable": ["lm_head", "*.layrs.1"]}, "train.trainable[1]", "did you mean *.layers.1?"),
        ({"freeze": ["*"]}, "train.freeze", "freeze fewer"),
        ({"freeze": ["qqqqqq"]}, "train.freeze[0]", "names look like model.embed_tokens.weight"),
    ],
)
def test_patterns_that_match_nothing(train: dict[str, Any], where: str, hint: str, whole: Job) -> None:
    with pytest.raises(UsageError) as caught:
        whole.plan(train={**whole.values["train"], **train})
    assert caught.value.where == where
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("lora", "where", "hint"),
    [
        ({"target_modules": ["q_porj"]}, "lora.target_modules", "did you mean q_proj?"),
        ({"target_modules": ["embed_tokens"]}, "lora.target_modules", "lora.modules_to_save"),
        ({"modules_to_save": ["lm_haed"]}, "lora.modules_to_save", "did you mean lm_head?"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "lora.target_modules", "shorten"),
    ],
)
def test_names_that_cannot_be_adapted(lora: dict[str, Any], where: str, hint: str, whole: Job) -> None:
    with pytest.raises(UsageError) as caught:
        whole.plan(lora=lora)
    assert caught.value.where == where
    assert hint in (caught.value.hint or "")
