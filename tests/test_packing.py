"""Several documents a sample: what shares a sample, and that no token attends to another document."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, full_model, losses, steps, train_plain
from rank_pool import RankPool

from llmpipe_cli.data.bins import best_fit
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.packing import packed_difference

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 48, "max_position_embeddings": 128, **SIZES}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 6, "num_key_value_heads": 2}
GPT2 = {"model_type": "gpt2", "n_positions": 128, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **SIZES}
TRAIN = {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 4e-3}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


class Unpacked(torch.nn.Module):
    """A model that runs each document of a packed micro-batch by itself, as transformers' own loss has it."""

    def __init__(self, model: torch.nn.Module, num_documents: list[int]) -> None:
        super().__init__()
        self.model, self.num_documents = model, num_documents

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        total, count = torch.zeros(()), 0
        for ids, positions, targets in zip(input_ids, position_ids, labels, strict=True):
            starts = (positions == 0).nonzero()[:, 0].tolist()
            self.num_documents.append(len(starts))
            for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
                num_targets = int((targets[start + 1 : stop] != -100).sum())
                if num_targets:
                    piece = {"input_ids": ids[None, start:stop], "labels": targets[None, start:stop]}
                    total = total + num_targets * self.model(**piece).loss
                    count += num_targets
        return type("Output", (), {"loss": total / count})()


def job_of(folder: Path, task: str, config: dict[str, Any], attention: str, **data: Any) -> Job:
    draw = random.Random(3)
    data = {"sequence_len": 128 if task == "chat" else 64, **data}
    words = ["tide", "lamp", "green", "of", "runs", "the", "seven", "boats", "under"]
    lines = []
    for _ in range(60):
        texts = [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(2)]
        turns = {"messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)]}
        lines.append(turns if task == "chat" else {"text": texts[0]})
    (folder / "train.jsonl").write_text("".join(f"{line}\n".replace("'", '"') for line in lines))
    values = {
        "name": "packed",
        "task": task,
        "model": {"config": config, "attn_implementation": attention},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"train": {"files": str(folder / "train.jsonl")}, "packing": True, **data},
        "train": TRAIN,
    }
    return Job(folder, values)


@pytest.mark.parametrize(
    ("task", "config", "attention"),
    [
        ("causal-lm", LLAMA, "sdpa"),
        ("causal-lm", MISTRAL, "eager"),
        ("causal-lm", GPT2, "sdpa"),
        ("chat", LLAMA, "eager"),
        ("chat", GPT2, "sdpa"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else value,
)
def test_two_stages_learn_what_single_documents_teach(
    task: str, config: dict[str, Any], attention: str, tmp_path: Path, pool: RankPool
) -> None:
    data = {} if task == "chat" else {"block_attention": True}
    job = job_of(tmp_path, task, config, attention, **data)
    plan, num_documents = job.plan(parallel={"pipeline": 2}), []
    expected, norms, _ = train_plain(plan, Unpacked(full_model(plan), num_documents))
    assert np.mean(num_documents) > 2
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [step["grad_norm"] for step in steps(run)] == pytest.approx(norms, rel=1e-4)
    if task == "causal-lm" and config is LLAMA:  # it makes a difference, and is asked for
        across = job.data.model_copy(update={"block_attention": False})
        job.data = across
        assert losses(job.train(pool, parallel={"pipeline": 2}))[0] != pytest.approx(expected[0], rel=1e-4)


def test_whole_conversations_share_samples(tmp_path: Path) -> None:
    job = job_of(tmp_path, "chat", LLAMA, "sdpa")
    split = job.data.train
    assert split is not None
    alone = open_split(split.model_copy(update={"kind": "records", "num_samples": split.num_documents}))
    whole = sorted(tuple(alone[index]["input_ids"].tolist()) for index in range(len(alone)))
    found = []
    for sample in (open_split(split)[index] for index in range(split.num_samples)):
        assert len(sample["input_ids"]) <= 128
        starts = np.flatnonzero(sample["positions"] == 0)
        found += [tuple(piece.tolist()) for piece in np.split(sample["input_ids"], starts[1:])]
    assert sorted(found) == whole, "each conversation is in one sample, whole and once"
    least = sum(map(len, whole)) / 128
    assert least <= split.num_samples <= 1.25 * least + 1


def test_best_fit_is_that_of_its_definition() -> None:
    draw = random.Random(1)
    lengths = np.array([draw.randint(0, 50) for _ in range(400)])
    bins: list[list[int]] = []
    for document in sorted(range(400), key=lambda index: (-min(lengths[index], 40), index)):
        room = [40 - sum(min(lengths[each], 40) for each in members) for members in bins]
        fitting = [number for number, left in enumerate(room) if left >= min(lengths[document], 40)]
        if fitting:
            bins[min(fitting, key=lambda number: room[number])].append(document)
        else:
            bins.append([document])
    found = best_fit(lengths, 40)
    assert len(found) == len(bins)
    assert sorted(document for members in found for document in members) == list(range(400))
    assert max(sum(min(lengths[each], 40) for each in members) for members in found) <= 40


@pytest.mark.parametrize("kind", ["bloom", "mamba", "opt"])
def test_types_that_cannot_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    reason = packed_difference(kind)
    if kind == "opt":
        assert reason is None or "logits differ" in reason
        return
    assert reason is not None
    job = job_of(tmp_path, "chat", {"model_type": kind, "hidden_size": 32}, "auto")
    with pytest.raises(UsageError, match=f"{kind} cannot keep the documents") as caught:
        job.plan()
    assert caught.value.where == "data.block_attention"
    job.data = job.data.model_copy(update={"block_attention": False})
    assert job.plan().model_type == kind
