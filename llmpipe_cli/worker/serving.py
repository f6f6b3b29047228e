"""A model that stays loaded over its stages and answers requests until it is told to end.

Rank 0 connects to a Unix socket of the controller and speaks JSON, one object a line. It hands every request to the
other ranks, all of them answer it together, and rank 0 writes the answer. Requests:

    {"op": "generate", "tokens": [[...]], "settings": {...}, "sampling": {...}, "stop": [...], "stream": true}
        -> with `stream` {"token": id} for each new token of the one prompt, then {"texts": [[...]]}
    {"op": "score", "tokens": [[...]], "from": [n, ...]}
        -> {"scores": [[sum of log-probabilities in nats of the tokens from position n on, whether all of them are the
           likeliest], ...]}
    {"op": "stop"}   ends a generation that runs, after the token it is at; sent while that request is unanswered
    {"op": "end"}    ends the job, as does the end of the connection
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from llmpipe_cli.engine.exchange import broadcast_json
from llmpipe_cli.engine.executor import MicroBatch, StageExecutor
from llmpipe_cli.engine.schedules import forward_only
from llmpipe_cli.errors import LlmpipeError
from llmpipe_cli.tasks.base import IGNORED
from llmpipe_cli.worker.generation import Batch, Generator
from llmpipe_cli.worker.process import Context, load_stage
from llmpipe_cli.worker.sampling import GenerationSettings, Sampling
from llmpipe_cli.worker.telemetry import MetricsWriter

# While nobody asks, ranks hear from rank 0 this often, far below the time after which they give it up.
_IDLE_SECONDS = 60.0


def serve(context: Context) -> int:
    """Answer requests until the controller ends or a stop is asked for. Returns the exit code."""
    executor = StageExecutor(load_stage(context), context.device)
    executor.module.eval()
    connection = _Connection(context.plan.options["socket"], context.stop.is_set) if context.is_first else None
    server = _Server(context, executor, connection)
    metrics = MetricsWriter(context.run.metrics if context.is_first else None)
    metrics.event("start", step=0, max_steps=None, layout=context.plan.layout.model_dump())
    if connection is not None:
        connection.write({"ready": True, "note": server.generator.decoder.uncached})
    while (request := broadcast_json(connection.next_request() if connection is not None else None))["op"] != "end":
        answer = server.answer(request)
        if connection is not None and answer is not None:
            connection.write(answer)
    metrics.event("end", step=0, state="done")
    return 0


class _Connection:
    """Rank 0's side of the socket; a thread reads, so that a stop is heard while the ranks compute."""

    def __init__(self, path: str, is_stopped: Any) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self._is_stopped = is_stopped
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stop_asked = threading.Event()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def next_request(self) -> dict[str, Any]:
        """The next request; `idle` when there is none for a while, `end` when there will be none."""
        waited = 0.0
        while waited < _IDLE_SECONDS:
            if self._is_stopped():
                return {"op": "end"}
            try:
                request = self._requests.get(timeout=0.2)
            except queue.Empty:
                waited += 0.2
                continue
            self.stop_asked.clear()
            return request
        return {"op": "idle"}

    def write(self, message: dict[str, Any]) -> None:
        """Send one object; nobody may be there any more."""
        try:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()
        except OSError:
            self._requests.put({"op": "end"})

    def _read(self) -> None:
        try:
            for line in self._file:
                message = json.loads(line)
                if message["op"] == "stop":
                    self.stop_asked.set()
                else:
                    self._requests.put(message)
        except (OSError, ValueError):
            pass
        self.stop_asked.set()
        self._requests.put({"op": "end"})


class _Server:
    """Answers requests; the same calls in the same order on every rank."""

    def __init__(self, context: Context, executor: StageExecutor, connection: _Connection | None) -> None:
        self._context, self._executor, self._connection = context, executor, connection
        stop = connection.stop_asked.is_set if connection is not None else lambda: False
        self.generator = Generator(context, executor, stop)
        self._tokenizer = AutoTokenizer.from_pretrained(context.plan.options["tokenizer"])
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens that the cache holds

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; none to a sign of life."""
        if request["op"] == "idle":
            return None
        try:
            if request["op"] == "score":
                return {"scores": self._score(request["tokens"], request["from"])}
            return {"texts": self._generate(request)}
        except LlmpipeError as error:  # raised on every rank before anything was exchanged
            return {"error": error.message, "hint": error.hint}

    def _generate(self, request: dict[str, Any]) -> list[list[int]]:
        sampling = Sampling(**request.get("sampling", {}))
        settings = GenerationSettings(
            **{**request.get("settings", {}), "sampling": sampling, "stop": tuple(request.get("stop", ()))}
        )
        rows: list[list[int]] = request["tokens"]
        texts: dict[int, list[int]] = {}

        def keep(batch: Batch, new: list[list[int]]) -> None:
            texts.update(zip(batch.indices, new, strict=True))

        batches = self.generator.batches(enumerate(rows), self._context.plan.micro_batch_size)
        if request.get("stream") and len(rows) == 1:
            streamer = _Streamer(self._connection)
            cache = self._cache_for(rows[0])
            self.generator.run(batches, settings, keep, tokenizer=self._tokenizer, streamer=streamer, cache=cache)
            self._cache = cache
            self._cached = [*rows[0], *streamer.tokens][: cache.get_seq_length()] if cache is not None else []
        else:
            self.generator.run(batches, settings, keep, tokenizer=self._tokenizer)
        return [texts.get(index, []) for index in range(len(rows))]

    def _cache_for(self, tokens: list[int]) -> Any:
        """The kept cache where the prompt goes on from what it holds, else a new one; none where there is none."""
        if self.generator.decoder.is_encoder_decoder:
            return None
        length = len(self._cached)
        if self._cache is not None and length < len(tokens) and tokens[:length] == self._cached:
            return self._cache
        return self.generator.decoder.new_cache()

    def _score(self, rows: list[list[int]], starts: list[int]) -> list[list[float]]:
        """Sum of the log-probabilities of each row's tokens from its start on, and 1 where all are the likeliest."""
        size, device, plan = self._context.plan.micro_batch_size, self._context.device, self._context.plan
        # Long rows first and together: rows of a micro-batch are padded to its longest.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        targets: list[Tensor] = []
        batches = []
        for number, group in enumerate(groups):
            inputs, wanted = _padded([rows[index] for index in group], [starts[index] for index in group])
            batches.append(MicroBatch(number, {name: value.to(device) for name, value in inputs.items()}, 0))
            targets.append(wanted.to(device))
        scores = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)

        def keep(position: int, output: Any) -> None:
            scores[groups[position]] = _log_likelihoods(output.logits, targets[position])

        with torch.no_grad():
            chunk = 8 * plan.layout.pipeline
            for first in range(0, len(batches), chunk):
                some = batches[first : first + chunk]
                instructions = forward_only(self._context.stage, plan.layout.pipeline, len(some), plan.placement)
                self._executor.run(
                    instructions,
                    some,
                    on_output=lambda position, output, first=first: keep(first + position, output),  # type: ignore[misc]
                )
        dist.all_reduce(scores)  # nothing but zeros on the other ranks
        return scores.tolist()


class _Streamer(BaseStreamer):
    """Notes new tokens, and on rank 0 sends them on as they come."""

    def __init__(self, connection: _Connection | None) -> None:
        self.tokens: list[int] = []
        self._connection = connection
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """transformers hands over the prompt first, then one token a step."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens += value.tolist()
        if self._connection is not None:
            self._connection.write({"token": self.tokens[-1]})

    def end(self) -> None:
        """Nothing is left to do."""


def _padded(rows: list[list[int]], starts: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on the right, where a causal model does not look, and the next token to score at each position.

    A row's last token is scored and not read.
    """
    longest = max(map(len, rows)) - 1
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, : len(row) - 1] = torch.tensor(row[:-1])
        mask[number, : len(row) - 1] = 1
        targets[number, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    inputs = {"input_ids": ids}
    return (inputs if bool(mask.all()) else {**inputs, "attention_mask": mask}), targets


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """[rows, 2]: sum of log-probabilities of each row's targets, and 1 where every target is the likeliest token."""
    results = []
    for row_logits, row_targets in zip(logits, targets, strict=True):
        scored = row_targets != IGNORED
        log_probabilities = row_logits[scored].float().log_softmax(-1)
        wanted = row_targets[scored]
        total = log_probabilities.gather(-1, wanted[:, None]).double().sum()
        results.append(torch.stack([total, (log_probabilities.argmax(-1) == wanted).all().double()]))
    return torch.stack(results)
