"""`llmpipe compress`: integer weights and fewer neurons, opened again by transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmpipe_cli.cli.app import app
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.compress import load_plain, quantize_directory, save_plain, weights_bytes
from llmpipe_cli.model.pruning import prune_heads, prune_mlp, prune_weights

MODELS = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "bert": ("BertForSequenceClassification", {"num_labels": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4}),
}
_COMMON = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def make(kind: str, folder: Path) -> Path:
    """A random model with weights large enough to matter."""
    name, fields = MODELS[kind]
    if kind == "t5":
        fields = {**fields, "vocab_size": 300, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    elif kind == "gpt2":
        fields = {**fields, "vocab_size": 300, "n_positions": 64}
    else:
        fields = {**_COMMON, **fields}
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.05)
    model.save_pretrained(folder / kind)
    return folder / kind


def reload(directory: Path) -> PreTrainedModel:
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory).eval()


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(64).mul(7).remainder(300).view(2, 32)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits


def rounded(weight: Tensor, bits: int, size: int) -> Tensor:
    """Each `size` numbers of a row as signed integers of `bits` bits, times a step that spans twice their magnitude."""
    groups = weight.detach().unflatten(1, (-1, size))
    step = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    integers = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (integers * step).flatten(1)


@pytest.mark.parametrize(
    ("kind", "bits", "largest_file", "distance"),
    [("llama", 8, 0.28, 0.05), ("bert", 8, 0.28, 0.05), ("t5", 8, 0.30, 0.05), ("llama", 4, 0.17, 0.4)],
)
def test_integers(kind: str, bits: int, largest_file: float, distance: float, tmp_path: Path) -> None:
    source, out = make(kind, tmp_path), tmp_path / "out"
    done = quantize_directory(source, out, bits)
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert weights_bytes(out) / weights_bytes(source) <= largest_file
    original, expected, again = reload(source), reload(source), reload(out)
    is_linear = {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)}
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    integers = {
        name.removesuffix("_packed").removesuffix(".weight")
        for name, dtype in stored.items()
        if dtype in ("I8", "I32") and not name.endswith("_shape")
    }
    assert (done.linear, done.embedding) == (len(integers & is_linear), len(integers - is_linear))
    with torch.no_grad():
        for name in integers:
            weight = expected.get_submodule(name).weight
            weight.copy_(rounded(weight, bits, 32 if bits == 4 else weight.shape[1]))
    found = logits(again)
    assert torch.allclose(found, logits(expected), atol=1e-4, rtol=1e-4)
    assert 0 < ((found - logits(original)).norm() / logits(original).norm()).item() < distance
    for name, parameter in expected.named_parameters():
        assert torch.allclose(again.get_parameter(name), parameter, atol=1e-6), name
        if name.removesuffix(".weight") not in integers:
            assert torch.equal(parameter, original.get_parameter(name))
    arguments = {"input_ids": torch.arange(10).view(2, 5) + 3, "max_new_tokens": 5, "do_sample": False}
    if kind != "bert":
        assert torch.equal(reload(out).generate(**arguments), expected.generate(**arguments))
    with pytest.raises(UsageError, match="quantized already"):
        load_plain(out)


@pytest.mark.parametrize("kind", list(MODELS))
def test_fewer_neurons(kind: str, tmp_path: Path) -> None:
    source, out = make(kind, tmp_path), tmp_path / "out"
    model = load_plain(source)
    width = {"gpt2": 512}.get(kind, 256)
    assert prune_mlp(model, 0.25) == (width, width * 3 // 4)
    save_plain(model, source, out)
    assert weights_bytes(out) < 0.95 * weights_bytes(source)
    again, zeroed = reload(out), reload(source)
    num_parameters = [sum(parameter.numel() for parameter in one.parameters()) for one in (again, zeroed)]
    assert num_parameters[0] < 0.95 * num_parameters[1]
    # The same as the whole model with the removed neurons silenced, which are those of the smallest product of norms.
    ins, out_of = {
        "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        "bert": (("intermediate.dense",), "output.dense"),
        "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
        "t5": (("DenseReluDense.wi_0", "DenseReluDense.wi_1"), "DenseReluDense.wo"),
    }[kind]
    prefixes = [name.removesuffix(ins[0]) for name, _ in zeroed.named_modules() if name.endswith(ins[0])]
    assert len(prefixes) == (4 if kind == "t5" else 2)

    def rows(model: PreTrainedModel, name: str) -> Tensor:
        """A layer's weight as [out, in], a view."""
        layer = model.get_submodule(name)
        return layer.weight.detach() if isinstance(layer, torch.nn.Linear) else layer.weight.detach().T

    for prefix in prefixes:
        kept_rows = {tuple(row) for row in rows(again, prefix + ins[0]).tolist()}
        is_kept = torch.tensor([tuple(row) in kept_rows for row in rows(zeroed, prefix + ins[0]).tolist()])
        assert is_kept.sum() == width * 3 // 4
        into = sum(rows(zeroed, prefix + name).square().sum(1) for name in ins)
        strength = into * rows(zeroed, prefix + out_of).square().sum(0)
        assert strength[is_kept].min() >= strength[~is_kept].max()
        rows(zeroed, prefix + out_of)[:, ~is_kept] = 0.0
    assert torch.allclose(logits(again), logits(zeroed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_fewer_heads(kind: str, tmp_path: Path) -> None:
    source, out = make(kind, tmp_path), tmp_path / "out"
    model = load_plain(source)
    assert prune_heads(model, 0.5) == (4, 2)
    save_plain(model, source, out)
    assert weights_bytes(out) < 0.9 * weights_bytes(source)
    again, silenced = reload(out), reload(source)
    assert again.config.num_attention_heads == 2
    # The same as the whole model whose removed heads, with the smallest product of norms, add nothing.
    names = [name.rpartition(".")[0] for name, _ in silenced.named_modules() if name.endswith((".o_proj", ".o"))]
    assert len(names) == (6 if kind == "t5" else 2)
    o, v = ("o_proj", "v_proj") if kind == "llama" else ("o", "v")
    num_groups = 2 if kind == "llama" else 4
    removed_by_stack: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        out_of, kept = silenced.get_submodule(f"{name}.{o}").weight, again.get_submodule(f"{name}.{o}").weight
        heads = out_of.detach().T.reshape(num_groups, -1, out_of.shape[0])
        columns = {tuple(column) for column in kept.T.tolist()}
        is_kept = torch.tensor([tuple(head[0].tolist()) in columns for head in heads])
        assert is_kept.sum() == num_groups // 2
        values = silenced.get_submodule(f"{name}.{v}").weight.detach().reshape(num_groups, -1)
        strength = heads.flatten(1).norm(dim=1) * values.norm(dim=1)
        if kind == "llama":
            assert strength[is_kept].min() >= strength[~is_kept].max()
        stack = f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"
        removed_by_stack.setdefault(stack, set()).add(tuple(is_kept.tolist()))
        heads[~is_kept] = 0.0
        out_of.data.copy_(heads.reshape(-1, out_of.shape[0]).T)
    if kind == "t5":  # layers that share a position bias by head keep the same heads
        assert len(removed_by_stack["encoder.SelfAttention"]) == len(removed_by_stack["decoder.SelfAttention"]) == 1
    assert torch.allclose(logits(again), logits(silenced), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fewer_weights(kind: str, tmp_path: Path) -> None:
    source, out = make(kind, tmp_path), tmp_path / "out"
    model = load_plain(source)
    before, after = prune_weights(model, 0.4)
    assert before < 0.001
    assert after == pytest.approx(0.4, abs=1e-4)
    save_plain(model, source, out)
    original, again = dict(reload(source).named_parameters()), dict(reload(out).named_parameters())
    num_pruned = 0
    for name, weight in again.items():
        expected = original[name].detach().clone()
        if weight.dim() == 2 and (".layers." in name or ".h." in name):
            num_smallest = round(0.4 * expected.numel())
            expected.view(-1)[expected.abs().flatten().topk(num_smallest, largest=False).indices] = 0.0
            num_pruned += 1
        assert torch.equal(weight, expected), name
    assert num_pruned == (14 if kind == "llama" else 8)


def test_refusals(tmp_path: Path) -> None:
    gpt2, bert = make("gpt2", tmp_path), make("bert", tmp_path)
    adapters, pickled, stranger = tmp_path / "adapters", tmp_path / "pickled", tmp_path / "stranger"
    for folder, name in ((adapters, "adapter_config.json"), (pickled, "config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    shutil.copytree(gpt2, stranger)
    (stranger / "config.json").write_text('{"architectures": ["pipeline"]}')  # transformers has it, and it is no model
    out = str(tmp_path / "out")
    for arguments, words in [
        ([str(gpt2), out], "nothing to do"),
        ([str(gpt2), str(gpt2), "--prune-mlp", "0.5"], "not empty"),
        ([str(gpt2), out, "--quantize", "int3"], "int8 or int4"),
        ([str(gpt2), out, "--quantize", "int8"], "most weights of this gpt2"),
        ([str(gpt2), out, "--prune-mlp", "1.5"], "between 0 and 1"),
        ([str(gpt2), out, "--prune-mlp", "0.001"], "less than the 8"),
        ([str(gpt2), out, "--prune-heads", "0.5"], "attention heads of gpt2 cannot be removed"),
        ([str(bert), out, "--prune-heads", "0.5"], "attention heads of bert cannot be removed"),
        ([str(gpt2), out, "--prune-weights", "0"], "between 0 and 1"),
        ([str(adapters), out, "--quantize", "int8"], "LoRA adapters"),
        ([str(pickled), out, "--prune-mlp", "0.5"], "safetensors"),
        ([str(stranger), out, "--prune-mlp", "0.5"], "no model class 'pipeline'"),
    ]:
        result = CliRunner().invoke(app, ["compress", *arguments])
        assert isinstance(result.exception, UsageError), (arguments, result.exception)
        assert words in result.exception.message
        assert not Path(out).exists()


@pytest.mark.slow
def test_report_with_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama", tmp_path)
    texts = [
        " ".join(f"the {(number * word) % 17}th fox jumps over dog {word}." for word in range(40))
        for number in range(20)
    ]
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>").save_pretrained(
        source
    )
    recipe = {
        "name": "c",
        "model": {"from": str(source)},
        "data": {"train": {"files": "corpus/*.txt"}, "validation": {"fraction": 0.2}, "sequence_len": 32},
        "train": {"max_steps": 1},
        "parallel": {"pipeline": 1},
        "output_dir": str(tmp_path / "runs"),
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    monkeypatch.setenv("LLMPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    arguments = ["compress", str(source), str(tmp_path / "out"), "--quantize", "int8", "--prune-mlp", "0.25"]
    arguments += ["--prune-heads", "0.5", "--prune-weights", "0.3"]
    result = CliRunner().invoke(app, [*arguments, "--recipe", str(tmp_path / "r.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert json.loads(result.stdout) == report
    assert report["bytes"]["ratio"] < 0.30
    assert report["neurons"] == {"before": 256, "after": 192}
    assert report["heads"] == {"before": 4, "after": 2}
    assert report["zeros"]["after"] == pytest.approx(0.3, abs=1e-3)
    assert report["tokens_per_second"]["after"] > 0
    assert report["metrics"]["loss"]["before"] != report["metrics"]["loss"]["after"]
    assert report["metrics"]["loss"]["after"] == pytest.approx(report["metrics"]["loss"]["before"], rel=0.5)
    again = reload(tmp_path / "out")
    assert again.config.intermediate_size == 192
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode([0]) == "</s>"
