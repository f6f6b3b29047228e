"""Text generation over pipeline stages: batches of prompts in, new tokens out.

`Generator` keeps as many batches in flight as there are stages, each with a cache of its own, so that every stage has
work while the last one's tokens travel back. `generate_hypotheses` is the entry point for other jobs on ranks that are
already joined; `generate` is a job of its own, from prompts to generations.jsonl.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from llmpipe_cli.engine.decoding import PipelineDecoder
from llmpipe_cli.engine.executor import StageExecutor
from llmpipe_cli.errors import EXIT_STOPPED, UsageError
from llmpipe_cli.worker.process import Context, load_stage
from llmpipe_cli.worker.prompts import PromptReader, ResultWriter
from llmpipe_cli.worker.sampling import GenerationSettings, Picker, Sampling
from llmpipe_cli.worker.stop import StopRequested
from llmpipe_cli.worker.telemetry import MetricsWriter

# Prompts within this many batches are put together by length.
_BATCHES_TO_SORT = 8


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated for together.

    Attributes:
        indices: number of each prompt.
        tokens: ids of each prompt; for an encoder-decoder model the encoder's input.
    """

    indices: list[int]
    tokens: list[list[int]]


OnResult = Callable[[Batch, list[list[int]]], None]


def generate_hypotheses(
    context: Context,
    executor: StageExecutor,
    sources: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    batch_size: int | None = None,
    generator: Generator | None = None,
) -> list[list[int]]:
    """What the model writes for each source: the one way to generate on ranks that are already joined.

    For an encoder-decoder model a source is the encoder's input, for others the prompt. All ranks of a replica (the
    stages of one pipeline) must call this together with the same arguments; replicas are independent of each other
    once they have a generator.

    Args:
        context: the worker's context.
        executor: runs this rank's stage; its module's mode (training or not) is restored.
        sources: token ids of each source, special tokens included, without padding.
        settings: greedy search, sampling or beam search.
        batch_size: sources a micro-batch; the plan's by default.
        generator: one made before, by all ranks of the job together. Making one costs a moment and some hooks in the
            model, so whoever generates more than once keeps it.

    Returns:
        The new token ids of each source, in order and on every rank: without the source, without the decoder's start
        token, and without the end-of-text token and what would follow it.

    Raises:
        StopRequested: the generator was asked to stop; on all ranks of the replica.
    """
    generator = generator or Generator(context, executor)
    was_training = executor.module.training
    executor.module.eval()
    results: dict[int, list[int]] = {}

    def keep(batch: Batch, new: list[list[int]]) -> None:
        results.update(zip(batch.indices, new, strict=True))

    numbered = [(index, list(source)) for index, source in enumerate(sources)]
    generator.run(generator.batches(numbered, batch_size or context.plan.micro_batch_size), settings, keep)
    executor.module.train(was_training)
    if generator.decoder.stopping:
        raise StopRequested
    return [results[index] for index in range(len(sources))]


class Generator:
    """Generates with the model whose stages this job's ranks hold. Made by all ranks of the job together.

    Args:
        context: the worker's context.
        executor: runs this rank's stage.
        should_stop: see `PipelineDecoder`.

    Attributes:
        decoder: the stages as one model.
    """

    def __init__(
        self, context: Context, executor: StageExecutor, should_stop: Callable[[], bool] | None = None
    ) -> None:
        self.decoder = PipelineDecoder(executor.module, context.device, should_stop)
        self._device = context.device
        model = self.decoder.model
        self._config = _generation_config(model, context.plan.weights)
        self._max_positions = getattr(model.config, "max_position_embeddings", None)
        # Recurrent states have no mask, and positions that a model counts itself would count the padding.
        takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        uncached = self.decoder.uncached is not None
        self._equal_lengths = not self.decoder.is_encoder_decoder and (uncached or not takes_positions)
        pad = self._config.pad_token_id
        self._pad = pad if pad is not None else min(self._end_tokens(), default=0)

    def batches(self, numbered: Iterable[tuple[int, list[int]]], size: int) -> Iterator[Batch]:
        """Batches of up to `size` prompts, similar lengths together; of equal length where the model needs that."""
        window: list[tuple[int, list[int]]] = []
        for item in numbered:
            window.append(item)
            if len(window) == size * _BATCHES_TO_SORT:
                yield from self._cut(window, size)
                window = []
        yield from self._cut(window, size)

    def run(
        self,
        batches: Iterator[Batch],
        settings: GenerationSettings,
        on_result: OnResult,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: Any = None,
        cache: Any = None,
    ) -> None:
        """Generate for all batches, several at a time.

        Args:
            batches: the same on every rank of the replica.
            settings: how to generate.
            on_result: gets each batch with the new tokens of its prompts, as batches end.
            tokenizer: needed for `settings.stop`.
            streamer: gets the tokens of a single batch as they come (transformers' streamer).
            cache: a cache that holds the beginning of a single prompt, to go on from.
        """

        def work() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while not self.decoder.stopping and (batch := next(batches, None)) is not None:
                on_result(batch, self._generate(batch, settings, tokenizer, streamer, cache))

        self.decoder.stopping = False
        self.decoder.turns.run([work] * self.decoder.num_stages)

    def _cut(self, window: list[tuple[int, list[int]]], size: int) -> Iterator[Batch]:
        current: list[tuple[int, list[int]]] = []
        for item in sorted(window, key=lambda numbered: len(numbered[1])):
            other_length = self._equal_lengths and current and len(current[0][1]) != len(item[1])
            if current and (len(current) == size or other_length):
                yield Batch([index for index, _ in current], [tokens for _, tokens in current])
                current = []
            current.append(item)
        if current:
            yield Batch([index for index, _ in current], [tokens for _, tokens in current])

    @torch.no_grad()
    def _generate(
        self, batch: Batch, settings: GenerationSettings, tokenizer: Any, streamer: Any, cache: Any
    ) -> list[list[int]]:
        """The new tokens of one batch."""
        decoder = self.decoder
        ids, mask = self._padded(batch.tokens)
        prompt_len = 1 if decoder.is_encoder_decoder else ids.shape[1]
        options = settings.options()
        if cache is not None:
            options["past_key_values"] = cache
        elif settings.use_cache and decoder.num_stages > 1:
            options["past_key_values"] = decoder.new_cache()
            options["use_cache"] = options["past_key_values"] is not None
        if settings.stop:
            options |= {"stop_strings": list(settings.stop), "tokenizer": tokenizer}
        view = decoder.view(self._config)
        view.pick_with(Picker(settings.sampling, batch.indices), prompt_len)
        sequences = view.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self._room(settings.max_new_tokens, prompt_len, batch),
            stopping_criteria=[_Stopped(decoder)],
            streamer=streamer,
            pad_token_id=self._pad,
            **{name: value for name, value in options.items() if value is not None},
        )
        return [self._without_end(row) for row in sequences[:, prompt_len:].tolist()]

    def _room(self, max_new_tokens: int, prompt_len: int, batch: Batch) -> int:
        """New tokens that the model has positions for, at most `max_new_tokens`."""
        if self._max_positions is None or self._max_positions < 0:
            return max_new_tokens
        if prompt_len >= self._max_positions:
            raise UsageError(
                f"the prompt has {prompt_len} tokens, the model {self._max_positions} positions",
                where=f"prompt {max(zip(map(len, batch.tokens), batch.indices, strict=True))[1]}",
            )
        return min(max_new_tokens, self._max_positions - prompt_len)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [rows, longest]: prompts end together, encoder inputs begin together."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if self.decoder.is_encoder_decoder else slice(longest - len(row), longest)
            ids[number, place] = torch.tensor(row)
            mask[number, place] = 1
        return ids.to(self._device), mask.to(self._device)

    def _end_tokens(self) -> set[int]:
        ends = self._config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends} - {None}

    def _without_end(self, row: list[int]) -> list[int]:
        """The tokens up to the end-of-text token; without the padding behind a row that ended before the others."""
        ends = self._end_tokens()
        length = next((place for place, token in enumerate(row) if token in ends), None)
        if length is None:
            length = len(row)
            while length and row[length - 1] == self._pad:
                length -= 1
        return row[:length]


class _Stopped(StoppingCriteria):
    """Ends a batch when a stop was asked for."""

    def __init__(self, decoder: PipelineDecoder) -> None:
        self._decoder = decoder

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._decoder.stopping, dtype=torch.bool, device=input_ids.device)


def _generation_config(model: Any, weights: str | None) -> GenerationConfig:
    """The model's own defaults: generation_config.json beside its weights, or what its config says."""
    if weights is not None and (Path(weights) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(weights)
    return model.generation_config


def generate(context: Context) -> int:
    """Go on from the plan's prompts; rank 0 writes generations.jsonl. Returns the exit code."""
    options = context.plan.options
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    executor = StageExecutor(load_stage(context), context.device)
    executor.module.eval()
    generator = Generator(context, executor, context.stop.is_set)
    settings = GenerationSettings(
        **{**options["settings"], "sampling": Sampling(**options["sampling"]), "stop": tuple(options.get("stop", ()))}
    )
    metrics = MetricsWriter(context.run.metrics if context.is_first else None)
    metrics.event("start", step=0, max_steps=None, layout=context.plan.layout.model_dump())
    if generator.decoder.uncached and settings.use_cache and context.plan.layout.pipeline > 1:
        metrics.event("warning", message=f"{generator.decoder.uncached}: every token computes its whole prefix")
    writer = ResultWriter(context.run.generations if context.is_first else None, tokenizer, settings.stop)
    reader = PromptReader(
        options if context.is_first else None,
        tokenizer,
        lambda prompts: generator.batches(prompts, context.plan.micro_batch_size),
    )
    done = 0

    def finish(batch: Batch, new: list[list[int]]) -> None:
        nonlocal done
        done += len(new)
        if context.is_first:
            writer.add(zip(batch.indices, map(reader.text, batch.indices), new, strict=True))
        metrics.event("progress", name="generating", done=done, total=options.get("num_prompts"))

    with writer, reader:
        generator.run(reader.batches(), settings, finish, tokenizer=tokenizer)
    computed = generator.decoder.num_computed_tokens
    stopped = generator.decoder.stopping  # then the texts of the batches in flight are not whole
    metrics.event("end", step=done, state="stopped" if stopped else "done", num_computed_tokens=computed)
    return EXIT_STOPPED if stopped else 0
