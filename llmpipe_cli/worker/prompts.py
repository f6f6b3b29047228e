"""Prompts in and texts out beside the stages: reading and encoding in one thread, decoding and writing in another.

Only rank 0 reads and writes. It sends the ids of each batch to the other ranks when a place in the pipeline is free.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from llmpipe_cli.engine.exchange import broadcast_json
from llmpipe_cli.errors import LlmpipeError, UsageError

if TYPE_CHECKING:
    from llmpipe_cli.worker.generation import Batch

# Batches that wait for the stages, and batches of results that wait for the disk.
_QUEUE_LEN = 8


def parse_prompts(lines: Iterable[str], file: Path) -> Iterator[str]:
    """The prompts of a file: one a line, or the field "prompt" of each line of a .jsonl file; empty lines are left out.

    Raises:
        UsageError: a line of a .jsonl file that is not such an object.
    """
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if file.suffix != ".jsonl":
            yield text
            continue
        try:
            prompt = json.loads(text)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not is_text(prompt):
            raise UsageError(
                'not a JSON object with a text as "prompt"', where=f"{file}:{number}", hint='{"prompt": "..."}'
            )
        yield prompt


def is_text(prompt: str) -> bool:
    """Whether a string is Unicode text: broken bytes of a command line and "\\ud800" in JSON give lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_prompt(prompt: str, index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt; an empty one begins with the tokenizer's first token.

    Raises:
        UsageError: it is not Unicode text, or it is empty and the tokenizer has no token to begin with.
    """
    if not is_text(prompt):
        raise UsageError(f"prompt {index} is not Unicode text", where=repr(prompt[:40]))
    tokens = list(tokenizer(prompt)["input_ids"])
    if tokens:
        return tokens
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UsageError(f"prompt {index} is empty and the tokenizer has no token to begin with")
    return [start]


class PromptReader:
    """Prompts as batches, the same on every rank. Used as a context manager, which runs the reading thread.

    Args:
        options: on rank 0: `prompts`, the texts given one by one, and `prompts_file`, a file with more; else none.
        tokenizer: of the model.
        group: puts numbered prompts into batches.
    """

    def __init__(
        self,
        options: dict[str, Any] | None,
        tokenizer: PreTrainedTokenizerBase,
        group: Callable[[Iterable[tuple[int, list[int]]]], Iterator[Batch]],
    ) -> None:
        self._options, self._tokenizer, self._group = options, tokenizer, group
        self._texts: dict[int, str] = {}
        self._batches: queue.Queue[Batch | LlmpipeError | None] = queue.Queue(_QUEUE_LEN)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prompts", daemon=True)

    def __enter__(self) -> PromptReader:
        if self._options is not None:
            self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._batches.get(timeout=0.1)

    def batches(self) -> Iterator[Batch]:
        """All batches; every rank must ask for them in the same order.

        Raises:
            UsageError: a prompt cannot be read; on every rank.
        """
        from llmpipe_cli.worker.generation import Batch

        while True:
            item = self._batches.get() if self._options is not None else None
            if isinstance(item, LlmpipeError):
                message: dict[str, Any] = {"error": [item.message, item.where, item.hint]}
            else:
                message = {"batch": None if item is None else [item.indices, item.tokens]}
            found = broadcast_json(message)
            if "error" in found:
                text, where, hint = found["error"]
                raise UsageError(text, where=where, hint=hint)
            if found["batch"] is None:
                return
            yield Batch(*found["batch"])

    def text(self, index: int) -> str:
        """Rank 0: the text of a prompt that is in a batch; forgotten afterwards."""
        return self._texts.pop(index, "")

    def _read(self) -> None:
        try:
            for batch in self._group(self._numbered()):
                self._put(batch)
            self._put(None)
        except LlmpipeError as error:
            self._put(error)
        except Exception as error:  # whatever it is: the stages wait for this thread
            self._put(UsageError(f"the prompts cannot be read: {type(error).__name__}: {error}"))

    def _put(self, item: Batch | LlmpipeError | None) -> None:
        while not self._over.is_set():
            with contextlib.suppress(queue.Full):
                self._batches.put(item, timeout=0.1)
                return

    def _numbered(self) -> Iterator[tuple[int, list[int]]]:
        for index, prompt in enumerate(self._prompts()):
            self._texts[index] = prompt
            yield index, encode_prompt(prompt, index, self._tokenizer)

    def _prompts(self) -> Iterator[str]:
        assert self._options is not None
        yield from self._options.get("prompts", ())
        if self._options.get("prompts_file"):
            file = Path(self._options["prompts_file"])
            with file.open(encoding="utf-8") as lines:
                yield from parse_prompts(lines, file)


class ResultWriter:
    """Decodes and writes one JSON object a prompt, in the prompts' order. Used as a context manager.

    Args:
        path: the file; none on ranks that do not write.
        tokenizer: of the model.
        stop: texts at which a result ends; they are not part of it.
    """

    def __init__(self, path: Path | None, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._path, self._tokenizer, self._stop = path, tokenizer, stop
        self._results: queue.Queue[list[tuple[int, str, list[int]]] | None] = queue.Queue(_QUEUE_LEN)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="results", daemon=True)

    def __enter__(self) -> ResultWriter:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._path is not None:
            self._results.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def add(self, results: Iterable[tuple[int, str, list[int]]]) -> None:
        """Write these: number of the prompt, its text, and the new tokens."""
        self._results.put(list(results))

    def _write(self) -> None:
        assert self._path is not None
        waiting: dict[int, dict[str, Any]] = {}
        following = 0
        try:
            with self._path.open("w", encoding="utf-8") as file:
                while (results := self._results.get()) is not None:
                    for index, prompt, tokens in results:
                        waiting[index] = self._line(index, prompt, tokens)
                    while following in waiting:
                        file.write(json.dumps(waiting.pop(following), ensure_ascii=False) + "\n")
                        following += 1
                    file.flush()
                for index in sorted(waiting):  # stopped before all prompts in between were done
                    file.write(json.dumps(waiting[index], ensure_ascii=False) + "\n")
        except Exception as error:  # raised when the results are closed; `add` must not wait for ever before
            self._error = error
            while self._results.get() is not None:
                pass

    def _line(self, index: int, prompt: str, tokens: list[int]) -> dict[str, Any]:
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return {
            "index": index,
            "prompt": prompt,
            "text": text[: min(ends, default=len(text))],
            "num_tokens": len(tokens),
        }
