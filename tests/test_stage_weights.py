"""Weights of single stages: from scratch, from files, back into files, and the memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_inputs
from transformers import AutoConfig

from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.slicing import trace_config
from llmpipe_cli.model.slicing.forward import forward_options
from llmpipe_cli.model.stage import build_stage, saved_names, stage_parameters
from llmpipe_cli.model.weights import stage_state_dict

MODELS = [
    ("causal-lm", "llama"),
    ("causal-lm", "gpt2"),
    ("causal-lm", "mixtral"),
    ("causal-lm", "bloom"),
    ("causal-lm", "qwen2_moe"),
    ("classification", "bert"),
    ("masked-lm", "bert"),
    ("translation", "t5"),
    ("translation", "marian"),
]


def bounds_of(num_segments: int) -> list[tuple[int, int]]:
    return [(0, num_segments // 2), (num_segments // 2, num_segments)]


@pytest.mark.parametrize(("task", "model_type"), MODELS)
def test_from_scratch_through_files_and_back(task: str, model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, task)
    cls = model_class(config, task)
    plan = trace_config(cls, config, task, sequence_len=16)
    bounds = bounds_of(plan.num_segments)

    # the same weights on one stage and on two, and nothing but its own on each
    whole = build_stage(cls, config, plan, range(plan.num_segments), seed=5)
    weights = dict(whole.named_parameters())
    assert not any(parameter.is_meta for parameter in weights.values())
    stages = [build_stage(cls, config, plan, range(start, stop), seed=5) for start, stop in bounds]
    for stage, (start, stop) in zip(stages, bounds, strict=True):
        own = {*stage_parameters(plan, range(start, stop)), *plan.replicated}
        assert {name for name, parameter in stage.named_parameters() if not parameter.is_meta} == own
        assert all(torch.equal(parameter, weights[name]) for name, parameter in stage.named_parameters() if name in own)

    # saved stage by stage: exactly what save_pretrained writes
    whole.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for stage, (start, stop) in zip(stages, bounds, strict=True):
        part = stage_state_dict(stage, saved_names(plan, range(start, stop)))
        assert not part.keys() & found.keys()
        found |= part
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # opened by transformers
    directory = tmp_path / "stages"
    config.save_pretrained(directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    opened = cls.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = tiny_inputs(task)
    options = forward_options(whole, inputs)
    with torch.no_grad():
        assert torch.equal(opened(**inputs, **options).logits, whole.eval()(**inputs, **options).logits)

    # and read again by stages
    for start, stop in bounds:
        stage = build_stage(cls, config, plan, range(start, stop), weights=directory, seed=99)
        own = {*stage_parameters(plan, range(start, stop)), *plan.replicated}
        for name, parameter in stage.named_parameters():
            assert parameter.is_meta == (name not in own)
            assert parameter.is_meta or torch.equal(parameter, weights[name]), name


def test_initialisation_is_that_of_transformers() -> None:
    """Mean and spread of each parameter are those of a model that transformers made from the config."""
    for task, model_type in MODELS:
        config = tiny_config(model_type, task)
        cls = model_class(config, task)
        plan = trace_config(cls, config, task, sequence_len=16)
        mine = dict(build_stage(cls, config, plan, range(plan.num_segments), seed=0).named_parameters())
        torch.manual_seed(0)
        for name, parameter in cls._from_config(config).named_parameters():
            found, expected = mine[name].detach(), parameter.detach()
            if expected.std() == 0:
                assert torch.equal(found, expected), name
            elif expected.numel() >= 512:
                assert float(found.std() / expected.std()) == pytest.approx(1, abs=0.15), f"{model_type} {name}"
                assert float((found.mean() - expected.mean()).abs()) < 0.2 * float(expected.std()), name


def test_seed_and_name_decide() -> None:
    config = tiny_config("llama")
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)
    first, same, other = (
        dict(build_stage(cls, config, plan, range(1, 3), seed=s).named_parameters()) for s in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.up_proj.weight"])


def test_a_new_head_on_a_pretrained_body(tmp_path: Path) -> None:
    """A language model's checkpoint gives a classifier its body; the head is drawn from the seed, in any layout."""
    config = tiny_config("bert", "masked-lm")
    cls = model_class(config, "masked-lm")
    plan = trace_config(cls, config, "masked-lm", sequence_len=16)
    body = build_stage(cls, config, plan, range(plan.num_segments), seed=1)
    body.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=3)
    cls = model_class(config, "classification")
    plan = trace_config(cls, config, "classification", sequence_len=16)
    whole = build_stage(cls, config, plan, range(plan.num_segments), weights=tmp_path, seed=7)
    last = build_stage(cls, config, plan, range(plan.num_segments - 1, plan.num_segments), weights=tmp_path, seed=7)
    assert torch.equal(whole.bert.encoder.layer[1].output.dense.weight, body.bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(whole.classifier.weight, last.classifier.weight)
    assert float(whole.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.5)


def test_sharded_files_and_bf16(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)
    whole = build_stage(cls, config, plan, range(plan.num_segments), seed=1)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    stage = build_stage(cls, config, plan, range(2, 4), weights=tmp_path, dtype=torch.bfloat16)
    for name in stage_parameters(plan, range(2, 4)):
        assert torch.equal(stage.get_parameter(name), whole.get_parameter(name).to(torch.bfloat16)), name


def test_buffers_that_stay_in_fp32(tmp_path: Path) -> None:
    """DeepSeek's selection bias decides which experts a token takes; from_pretrained keeps it in fp32 under bf16."""
    config = tiny_config("deepseek_v3")
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)
    whole = build_stage(cls, config, plan, range(plan.num_segments), seed=1)
    name = next(name for name, _ in whole.named_buffers() if name.endswith("e_score_correction_bias"))
    whole.get_buffer(name).normal_()
    whole.save_pretrained(tmp_path)
    expected = cls.from_pretrained(tmp_path, dtype=torch.bfloat16).get_buffer(name)
    stage = build_stage(cls, config, plan, range(2, 4), weights=tmp_path, dtype=torch.bfloat16)
    assert expected.dtype is torch.float32
    assert stage.get_buffer(name).dtype is torch.float32
    assert torch.equal(stage.get_buffer(name), expected)
    assert stage.dtype is torch.bfloat16


def test_broken_weights_are_told(tmp_path: Path) -> None:
    config = tiny_config("llama")
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)

    def read() -> None:
        build_stage(cls, config, plan, range(plan.num_segments), weights=tmp_path)

    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        read()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match="pickles") as caught:
        read()
    assert "save_pretrained" in (caught.value.hint or "")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read()
    other = tiny_config("llama", intermediate_size=64)
    build_stage(cls, other, plan, range(plan.num_segments), seed=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \(32, 64\), the config asks for \(32, 48\)"):
        read()
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors is missing"):
        read()


_MEASURE = """
import ctypes, json, sys, threading, time
import torch
from transformers import AutoConfig
from llmpipe_cli.model.slicing import SlicePlan
from llmpipe_cli.model.stage import build_stage, stage_parameters
from llmpipe_cli.model.auto import model_class

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

directory, seed = sys.argv[1], (int(sys.argv[2]) if sys.argv[2] != "-" else None)
plan = SlicePlan.from_json(json.load(open(directory + "/plan.json")))
config = AutoConfig.from_pretrained(directory)
cls = model_class(config, "causal-lm")
import deepspeed, transformers.integrations.moe, transformers.core_model_loading  # a constant, not the model's
half = plan.num_segments // 2
build_stage(cls, config, plan, range(0))  # so is what a first construction leaves behind
before = peak = anonymous_bytes()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = build_stage(cls, config, plan, range(half), seed=seed, weights=None if seed is not None else directory)
done = True
thread.join()
own = sum(model.get_parameter(n).numel() * 4 for n in stage_parameters(plan, range(half)))
print(json.dumps({"own": own, "peak": peak - before, "after": anonymous_bytes() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_memory_while_loading_is_the_stages_own(model_type: str, tmp_path: Path) -> None:
    """Half of a model of about 300 MB: at most 1.3 times its own bytes and 30 MB, from files and from scratch."""
    sizes = {"hidden_size": 512, "vocab_size": 8192, "head_dim": 64, "num_attention_heads": 8}
    if model_type == "llama":
        sizes |= {"num_hidden_layers": 16, "intermediate_size": 2048}
    else:
        sizes |= {"num_hidden_layers": 8, "intermediate_size": 1024, "num_local_experts": 4}
    config = tiny_config(model_type, **sizes)
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    build_stage(cls, config, plan, range(plan.num_segments), seed=1).save_pretrained(tmp_path, max_shard_size="100MB")
    total = sum(segment.num_parameters for segment in plan.segments) * 4
    assert 200e6 < total < 400e6
    measurements = [
        subprocess.Popen([sys.executable, "-c", _MEASURE, str(tmp_path), seed], stdout=subprocess.PIPE, text=True)
        for seed in ("-", "3")
    ]
    outputs = [process.communicate()[0] for process in measurements]
    assert not any(process.returncode for process in measurements)
    for output in outputs:
        measured = json.loads(output.strip().splitlines()[-1])
        assert 0.3 * total < measured["own"] < 0.7 * total
        assert measured["after"] >= 0.95 * measured["own"], "weights must not stay mapped to the file"
        assert measured["peak"] <= 1.3 * measured["own"] + 30e6, measured


def test_pickles_only_on_request(tmp_path: Path) -> None:
    """pytorch_model.bin gives the very weights of the safetensors, and nothing but tensors comes out of it."""
    config = tiny_config("gpt2", "causal-lm")
    cls = model_class(config, "causal-lm")
    plan = trace_config(cls, config, "causal-lm", sequence_len=16)
    whole = build_stage(cls, config, plan, range(plan.num_segments), seed=5)
    state = {name: tensor for name, tensor in whole.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickles") as caught:
        build_stage(cls, config, plan, range(2), weights=tmp_path)
    assert "allow_pickle: true" in (caught.value.hint or "")
    for start, stop in bounds_of(plan.num_segments):
        stage = build_stage(cls, config, plan, range(start, stop), weights=tmp_path, allow_pickle=True)
        for name in stage_parameters(plan, range(start, stop)):
            assert torch.equal(stage.get_parameter(name), whole.get_parameter(name)), name
    torch.save({"weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        build_stage(cls, config, plan, range(2), weights=tmp_path, allow_pickle=True)
