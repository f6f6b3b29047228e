"""``llmpipe chat``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.generate import minimal_recipe, tokenizer_source
from llmpipe_cli.cli.options import (
    DevicesOption,
    DrawSeedOption,
    DtypeOption,
    EnvOption,
    ModelArgument,
    OutputDirOption,
    RepetitionPenaltyOption,
    StagesOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    launch_options,
)
from llmpipe_cli.cli.served import ServedModel
from llmpipe_cli.errors import UsageError

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves; Ctrl-C stops a reply"


def chat(
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told before the conversation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest reply, in tokens.")] = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: DrawSeedOption = 1234,
    dtype: DtypeOption = "fp32",
    stages: StagesOption = None,
    output_dir: OutputDirOption = Path("runs"),
    devices: DevicesOption = None,
    env: EnvOption = None,
) -> None:
    """Talk with a model that is split over pipeline stages of this machine."""
    from llmpipe_cli.cli.models import find_model, naming, warn_of_drawn_weights

    options = launch_options(devices, env=env, grace_seconds=10.0)

    found = find_model(model, output_dir)
    with naming(found, output_dir):
        recipe = minimal_recipe(found, dtype, stages, 1)
    conversation = Conversation(tokenizer_source(found), system)
    plan = jobs.plan_job(
        recipe,
        None,
        jobs.devices_for(options),
        job="serve",
        checkpoint=found,
        options={"tokenizer": tokenizer_source(found)},
    )
    warn_of_drawn_weights(plan)
    request = {
        "op": "generate",
        "stream": True,
        "settings": {"max_new_tokens": max_new_tokens, "num_beams": 1},
        "sampling": {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
        },
    }
    with ServedModel(plan, output_dir, options) as served:
        if served.note and plan.layout.pipeline > 1:
            console.say(f"warning: {served.note}: every token computes its whole prefix", "yellow")
        console.say(_HELP, "dim")
        _talk(served, conversation, request, seed)


class Conversation:
    """What has been said, as the model's chat template puts it; as plain text for a model without one.

    Args:
        source: where the tokenizer is.
        system: a first message to the model.
    """

    def __init__(self, source: str, system: str | None) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UsageError(f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}", where=source) from error
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        if self.tokenizer.chat_template is None:
            console.say("warning: the tokenizer has no chat template: the model goes on from plain text", "yellow")

    def reset(self) -> None:
        """Forget everything but the first message."""
        self.messages = list(self._start)

    def say(self, role: str, content: str) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": content})

    def tokens(self) -> list[int]:
        """The prompt for the next reply."""
        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in self.messages) + "\n"
            return list(self.tokenizer(text)["input_ids"])
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _talk(served: ServedModel, conversation: Conversation, request: dict[str, Any], seed: int) -> None:
    """Read a line, print the reply, until the user leaves."""
    turn = 0
    while (text := _read_line()) is not None:
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
            console.say("forgotten", "dim")
        elif text.startswith("/"):
            console.say(_HELP, "dim")
        elif text:
            conversation.say("user", text)
            draws = {**request["sampling"], "seed": seed + turn}
            try:
                reply = _reply(served, conversation, {**request, "sampling": draws})
            except UsageError as error:
                console.print_error(error)
                conversation.messages.pop()
                continue
            conversation.say("assistant", reply)
            turn += 1


def _read_line() -> str | None:
    """A line from the user; none at the end of input. Ctrl-C empties the line."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        console.say(_HELP, "dim")
        return ""
    finally:
        signal.signal(signal.SIGINT, before)


def _reply(served: ServedModel, conversation: Conversation, request: dict[str, Any]) -> str:
    """Print the reply as it comes; Ctrl-C ends it where it is. Returns the text."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        served.stop_reply()

    before = signal.signal(signal.SIGINT, stop)
    tokens: list[int] = []
    shown = ""
    try:
        for message in served.answers({**request, "tokens": [conversation.tokens()]}):
            final = "texts" in message
            tokens = message["texts"][0] if final else [*tokens, message["token"]]
            text = str(conversation.tokenizer.decode(tokens, skip_special_tokens=True))
            # A character of several tokens is a replacement character until its last one is there.
            if text.startswith(shown) and (final or not text.endswith("\ufffd")):
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stdout.write("\n")
        sys.stdout.flush()
    return shown
