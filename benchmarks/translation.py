"""A small Marian from scratch: `llmpipe` at two stages beside a plain transformers loop on the same batches.

    python benchmarks/translation.py TRAIN.jsonl TEST.jsonl [--source en --target de --steps 850]

Both files hold a pair of texts a line. `llmpipe` trains the tokenizer, transformers draws the weights, and both sides
start from these, draw the same pairs in the same order, without dropout, with smoothed labels. The plain side
tokenises, pads, learns and generates by itself; its texts are scored by sacrebleu. Exits with 1 unless BLEU of
`llmpipe evaluate` is what sacrebleu's command line finds in the written texts and what transformers generates with the
same checkpoint, beats copying the source, and is within a point of the plain side's (the two trainings add up the same
numbers in another order, and drift apart over thousands of steps).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from commands import full_path, llmpipe, read_rows, write_recipe
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianConfig, MarianMTModel, get_scheduler
from transformers.trainer_pt_utils import LabelSmoother

from llmpipe_cli.data.order import SampleOrder

_SOURCE_LENGTH, _TARGET_LENGTH = 40, 48  # tokens
_BATCH = 16
_AT_ONCE = 64  # texts generated together
_LEARNING_RATE = 1.5e-3
_SMOOTHING = 0.1
_SEED = 1
_LAST = 100  # steps whose mean loss is told
_SIZES: dict[str, Any] = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "scale_embedding": True,
}
Pairs = list[tuple[str, str]]


def main() -> int:
    """Train, generate and score both sides, print one JSON line; returns the exit code."""
    arguments = _arguments()
    train, test = (
        [(row[arguments.source], row[arguments.target]) for row in read_rows(path)]
        for path in (arguments.train, arguments.test)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        start = _start(arguments, folder)
        recipe = write_recipe(folder, _recipe(arguments, {"from": str(start), "dropout": 0.0}))
        trained = llmpipe("train", recipe, "--devices", "2", "--resume", "auto", folder=folder)
        checkpoint = folder / trained["checkpoint"]
        metrics = llmpipe("evaluate", recipe, "--checkpoint", checkpoint, "--devices", "2", folder=folder)["metrics"]
        written = max(folder.glob("runs/*/hypotheses.txt"), key=lambda path: path.stat().st_mtime).parent
        figures = {
            "llmpipe evaluate": metrics["bleu"],
            "sacrebleu's command line": _command_line(written),
            "transformers, llmpipe's checkpoint": _bleu(_generate(checkpoint, test), test),
            "plain loop": _bleu(_generate(_plain(start, train, arguments.steps, folder / "plain"), test), test),
            "copy of the source": _bleu([source for source, _ in test], test),
        }
        losses = {"llmpipe": _losses(folder), "plain loop": json.loads((folder / "plain" / "losses.json").read_text())}
    apart = [abs(ours / plain - 1) for ours, plain in zip(*losses.values(), strict=True)]
    ends = {side: statistics.mean(values[-_LAST:]) for side, values in losses.items()}
    drift = {f"losses_apart_to_step_{steps}": max(apart[:steps]) for steps in (10, 100) if steps <= len(apart)}
    print(json.dumps({"bleu": figures, "chrf": metrics["chrf"], "steps": len(apart), "last_losses": ends, **drift}))
    same = [figures["sacrebleu's command line"], figures["transformers, llmpipe's checkpoint"]]
    equal = all(abs(figures["llmpipe evaluate"] - other) < 1e-6 for other in same)
    near = abs(figures["llmpipe evaluate"] - figures["plain loop"]) <= 1
    return 0 if equal and near and figures["llmpipe evaluate"] > figures["copy of the source"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=full_path, help="JSON Lines with a pair of texts")
    parser.add_argument("test", type=full_path, help="the same, never trained on")
    parser.add_argument("--source", default="en", help="field to translate from")
    parser.add_argument("--target", default="de", help="field to translate to")
    parser.add_argument("--steps", type=int, default=850, help=f"optimizer steps of {_BATCH} pairs")
    parser.add_argument("--folder", type=full_path, help="keep recipes, runs and models here, and go on with them")
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, model: dict[str, Any]) -> dict[str, Any]:
    fields = {"source": arguments.source, "target": arguments.target}
    return {
        "name": "translation",
        "task": "translation",
        "model": model,
        "data": {
            "train": {"files": str(arguments.train), **fields},
            "validation": {"files": str(arguments.test), **fields},
            "sequence_len": _SOURCE_LENGTH,
            "target_sequence_len": _TARGET_LENGTH,
        },
        "train": {
            "max_steps": arguments.steps,
            "global_batch_size": _BATCH,
            "micro_batch_size": 8,
            "learning_rate": _LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": _warmup_steps(arguments.steps),
            "max_grad_norm": 1.0,
            "label_smoothing": _SMOOTHING,
            "seed": _SEED,
        },
        "parallel": {"pipeline": 2},
        "checkpoint": {"every_steps": 250, "keep": 1},
    }


def _warmup_steps(steps: int) -> int:
    return min(200, steps // 10)


def _start(arguments: argparse.Namespace, folder: Path) -> Path:
    """Random weights and the tokenizer that `llmpipe` trains on the training pairs, as both sides read them."""
    start = folder / "start"
    if (start / "config.json").exists():
        return start
    recipe = _recipe(arguments, {"config": {"model_type": "marian", **_SIZES}})
    recipe = {**recipe, "name": "tokenizer", "tokenizer": {"train": {"vocab_size": 3000}}}
    prepared = llmpipe("data", "prepare", write_recipe(folder, recipe), folder=folder)
    tokenizer = AutoTokenizer.from_pretrained(prepared["tokenizer_dir"])
    tokenizer.save_pretrained(start)
    torch.manual_seed(_SEED)
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    ends = {"eos_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None}
    config = MarianConfig(**_SIZES, **ids, **ends, vocab_size=len(tokenizer), dropout=0.0)
    MarianMTModel(config).save_pretrained(start)
    return start


def _plain(start: Path, train: Pairs, steps: int, folder: Path) -> Path:
    """The same training in one process with transformers and torch; gives the folder of the result, with the loss of
    each step in losses.json."""
    if (folder / "losses.json").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSeq2SeqLM.from_pretrained(start).train()
    smoothed = LabelSmoother(_SMOOTHING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, _warmup_steps(steps), steps)
    order = SampleOrder(len(train), _SEED)
    losses = []
    for step in range(steps):
        pairs = [train[index] for index in order.indices(step * _BATCH, (step + 1) * _BATCH)]
        inputs = _encode(tokenizer, [source for source, _ in pairs], _SOURCE_LENGTH)
        targets = _encode(tokenizer, [target for _, target in pairs], _TARGET_LENGTH)
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        loss = smoothed(model(**inputs, labels=labels), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "losses.json").write_text(json.dumps(losses) + "\n")
    return folder


def _losses(folder: Path) -> list[float]:
    """The loss of each step of `llmpipe train`, over the runs that went on with one another."""
    losses = {}
    for path in sorted(folder.glob("runs/translation-2*/metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        losses.update({row["step"]: row["loss"] for row in read_rows(path) if "event" not in row and "loss" in row})
    return [losses[step] for step in sorted(losses)]


def _encode(tokenizer: Any, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    encoded = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _generate(folder: Path, test: Pairs) -> list[str]:
    """What a saved model writes for each source, with transformers alone: greedy search."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = []
    for first in range(0, len(test), _AT_ONCE):
        inputs = _encode(tokenizer, [source for source, _ in test[first : first + _AT_ONCE]], _SOURCE_LENGTH)
        greedy = {"do_sample": False, "num_beams": 1, "forced_eos_token_id": None}
        tokens = model.generate(**inputs, max_new_tokens=_TARGET_LENGTH, **greedy)
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _bleu(texts: list[str], test: Pairs) -> float:
    return float(sacrebleu.corpus_bleu(texts, [[" ".join(target.split()) for _, target in test]]).score)


def _command_line(folder: Path) -> float:
    """BLEU of the written hypotheses, by sacrebleu's command line."""
    command = [sys.executable, "-m", "sacrebleu", "references.txt", "-i", "hypotheses.txt", "-b", "-w", "10"]
    return float(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
