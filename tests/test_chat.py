"""Chat in a real terminal (a pty), and generation from a file, both through the command line on real ranks."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_generation import _expected, _model

from llmpipe_cli.run import RunDirectory, read_json

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
LLMPIPE = [sys.executable, "-m", "llmpipe_cli.cli.app"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, ENVIRONMENT)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Read until the pattern comes, and forget what was before its end."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.output)) is None:
            assert time.monotonic() < end, f"{pattern!r} has not come: {self.output}"
            if select.select([self._file], [], [], 0.5)[0]:
                try:
                    self.output += os.read(self._file, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.output), self.output
        self.output = self.output[found.end() :]
        return found

    def end(self, seconds: float = 240) -> int:
        """Exit code of the command."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._file, 65536).decode(errors="replace")
                except OSError:
                    time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the command has not ended: {self.output}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = _model(tmp_path_factory.mktemp("chat"), "llama")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_conversation_in_a_terminal(model: Path, tmp_path: Path) -> None:
    """Replies are those of transformers on the templated conversation, also when the cache is kept; Ctrl-C stops a
    long reply and nothing else; a killed rank ends the chat with its name."""
    command = [*LLMPIPE, "chat", str(model), "--stages", "2", "--devices", "2", "--temperature", "0"]
    terminal = Terminal([*command, "--max-new-tokens", "20"], tmp_path)
    terminal.wait_for("> ")
    first = _expected(model, ["hello "], do_sample=False)[0]
    terminal.type("hello\n")
    assert terminal.wait_for(r"hello\r\n(.*?)\r\n> ")[1] == first
    second = _expected(model, [f"hello {first} and more "], do_sample=False)[0]
    terminal.type("and more\n")
    assert terminal.wait_for(r"and more\r\n(.*?)\r\n> ")[1] == second
    terminal.type("/reset\n")
    terminal.wait_for("forgotten.*\n> ")
    terminal.type("hello\n")
    assert terminal.wait_for(r"hello\r\n(.*?)\r\n> ")[1] == first
    terminal.type("/quit\n")
    assert terminal.end() == 0

    terminal = Terminal([*command, "--max-new-tokens", "90000"], tmp_path)
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for(re.escape(first))
    terminal.type("\x03")
    terminal.wait_for(r"\r\n> ")
    terminal.type("again\n")
    terminal.wait_for(r"again\r\n.....")
    run = max((tmp_path / "runs").iterdir())
    os.kill(read_json(RunDirectory(run).rank_record(1))["worker_pid"], signal.SIGKILL)
    assert terminal.end() == 4
    assert "rank 1" in terminal.output


def test_prompts_from_a_file(model: Path, tmp_path: Path) -> None:
    prompts = ["short", "two words", "x"]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    flags = ["--prompts", "in.jsonl", "-o", "out.jsonl", "--max-new-tokens", "20", "--batch-size", "2", "--stages", "2"]
    command = [*LLMPIPE, "generate", str(model), "--devices", "2", *flags]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["prompt"] for result in results] == prompts
    assert [result["text"] for result in results] == _expected(model, prompts, do_sample=False)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    failed = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2
    assert "in.jsonl:2" in failed.stderr
