"""Text generation over pipeline stages.

All prompts are decoded together, in micro-batches that follow each other through the stages. Rows are padded on the
right: under causal attention a token never sees what is behind it, so positions need no correction, and each row's next
token comes from the logits of its own last token. After every round the last stage tells all ranks the new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmpipe_cli.engine.executor import MicroBatch, StageExecutor
from llmpipe_cli.engine.schedules import forward_only
from llmpipe_cli.errors import UsageError
from llmpipe_cli.worker.process import Context, load_stage
from llmpipe_cli.worker.sampling import GenerationSettings, Sampler, Sampling
from llmpipe_cli.worker.telemetry import MetricsWriter

_FINISHED = -1


@dataclass
class _Row:
    """One prompt and what has been generated for it."""

    index: int
    prompt: str
    source: list[int]
    """Prompt tokens."""
    new: list[int] = field(default_factory=list)
    finished: bool = False


def generate(context: Context) -> int:
    """Continue the plan's prompts; rank 0 writes generations.jsonl. Returns the exit code."""
    options = context.plan.options
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    executor = StageExecutor(load_stage(context), context.device)
    executor.module.eval()
    rows = _read_prompts(options["prompts"], tokenizer)
    metrics = MetricsWriter(context.run.metrics if context.is_first else None)
    metrics.event("start", step=0, max_steps=options["max_new_tokens"], layout=context.plan.layout.model_dump())
    settings = GenerationSettings(options["max_new_tokens"], 1, Sampling(**options["sampling"]))
    generator = _Generator(context, executor, settings, context.plan.micro_batch_size)
    for count in range(options["max_new_tokens"]):
        active = [row for row in rows if not row.finished]
        if not active or context.stop.is_set():
            break
        generator.extend(active)
        metrics.event("token", step=count + 1, active=len(active))
    if context.is_first:
        with context.run.generations.open("w", encoding="utf-8") as file:
            for row in rows:
                text = tokenizer.decode(row.new, skip_special_tokens=True)
                line = {"index": row.index, "prompt": row.prompt, "text": text, "num_tokens": len(row.new)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    metrics.event("end", step=len(rows), state="done")
    return 0


def generate_hypotheses(
    context: Context,
    executor: StageExecutor,
    sources: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    batch_size: int | None = None,
) -> list[list[int]]:
    """What the model writes for each source: the one way to generate on ranks that are already joined.

    For an encoder-decoder model a source is the encoder's input, for others the prompt. All ranks of a replica (the
    stages of one pipeline) must call this together with the same arguments; replicas are independent of each other.

    Args:
        context: the worker's context.
        executor: runs this rank's stage; its module's mode (training or not) is restored.
        sources: token ids of each source, special tokens included, without padding.
        settings: greedy search, sampling or beam search.
        batch_size: sources a micro-batch; the plan's by default.

    Returns:
        The new token ids of each source, in order and on every rank: without the source, without the decoder's start
        token, and without the end-of-text token and what would follow it.
    """
    if settings.num_beams not in (None, 1):
        raise UsageError("beam search is not available yet", where="num_beams")
    rows = [_Row(index, "", list(source)) for index, source in enumerate(sources)]
    generator = _Generator(context, executor, settings, batch_size or context.plan.micro_batch_size)
    was_training = executor.module.training
    executor.module.eval()
    for _ in range(settings.max_new_tokens):
        active = [row for row in rows if not row.finished]
        if not active:
            break
        generator.extend(active)
    executor.module.train(was_training)
    return [row.new for row in rows]


class _Generator:
    def __init__(
        self, context: Context, executor: StageExecutor, settings: GenerationSettings, batch_size: int
    ) -> None:
        self._executor, self._device = executor, context.device
        self._stages = context.plan.layout.pipeline
        self._stage = context.stage
        self._batch_size = batch_size
        self._last_rank = dist.get_world_size() - 1
        config = executor.module.skeleton.config
        self._start_token = int(config.decoder_start_token_id) if config.is_encoder_decoder else -1
        self._is_encoder_decoder = config.is_encoder_decoder
        self._max_positions = getattr(config, "max_position_embeddings", None)
        self._pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
        ends = executor.module.skeleton.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._end_tokens = {token for token in ends if token is not None}
        self._sampler = Sampler(settings.sampling)

    def extend(self, rows: list[_Row]) -> None:
        """Add one token to each row; marks rows that are finished."""
        groups = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        batches = [MicroBatch(index, self._inputs(group), 0) for index, group in enumerate(groups)]
        tokens = torch.full((len(rows),), _FINISHED, dtype=torch.int64)

        def draw(position: int, output: Any) -> None:
            for offset, row in enumerate(groups[position]):
                logits = output.logits[offset, self._length(row) - 1]
                number = position * self._batch_size + offset
                tokens[number] = self._sampler.next_token(logits, row.index, len(row.new))

        with torch.no_grad():
            order = forward_only(self._stage, self._stages, len(batches))
            self._executor.run(order, batches, on_output=draw)
        tokens = tokens.to(self._device)
        dist.broadcast(tokens, self._last_rank)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if token in self._end_tokens:
                row.finished = True
                continue
            row.new.append(token)
            row.finished = self._max_positions is not None and self._length(row) >= self._max_positions

    def _length(self, row: _Row) -> int:
        """Tokens of the sequence that grows."""
        return 1 + len(row.new) if self._is_encoder_decoder else len(row.source) + len(row.new)

    def _inputs(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        if not self._is_encoder_decoder:
            return self._padded([row.source + row.new for row in rows], "input_ids", "attention_mask")
        inputs = self._padded([row.source for row in rows], "input_ids", "attention_mask")
        growing = [[self._start_token, *row.new] for row in rows]
        inputs.update(self._padded(growing, "decoder_input_ids", "decoder_attention_mask"))
        return inputs

    def _padded(self, sequences: list[list[int]], name: str, mask_name: str) -> dict[str, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, sequence in enumerate(sequences):
            ids[number, : len(sequence)] = torch.tensor(sequence)
            mask[number, : len(sequence)] = 1
        inputs = {name: ids.to(self._device)}
        if not bool(mask.all()):
            inputs[mask_name] = mask.to(self._device)
        return inputs


def _read_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[_Row]:
    rows = []
    for index, prompt in enumerate(prompts):
        tokens = tokenizer(prompt)["input_ids"]
        if not tokens:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if start is None:
                raise UsageError(f"prompt {index} is empty and the tokenizer has no token to begin with")
            tokens = [start]
        rows.append(_Row(index, prompt, list(tokens)))
    return rows
