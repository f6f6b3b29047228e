"""Folders and files on their way to a node, and a node's run directory on its way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmpipe_cli.cluster.mirror import Inbox, Outbox
from llmpipe_cli.cluster.shipping import Receiver, digest, folder_messages, safe_name
from llmpipe_cli.engine.manifest import file_entry, point, write_manifest
from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.run import RunDirectory


def moved(messages: Any, old: Path, new: Path) -> list[dict[str, Any]]:
    """The messages as they are on the wire, for another place."""
    return [json.loads(json.dumps(message).replace(str(old), str(new))) for message in messages]


def test_folders_and_files_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "large.bin").write_bytes(bytes(range(256)) * 40_000)
    (source / "empty").touch()
    (tmp_path / "prompts.txt").write_text("one\n")
    answers: list[dict[str, Any]] = []
    for path, place in ((source, target), (tmp_path / "prompts.txt", tmp_path / "there.txt")):
        expected = digest(path)
        assert expected is not None
        receiver = Receiver()
        for message in moved(folder_messages(path, expected), path, place):
            receiver.take(message, answers.append)
        assert digest(place) == expected
    assert [answer["whole"] for answer in answers] == [True, True]

    damaged = tmp_path / "damaged"
    messages = moved(folder_messages(source, str(digest(source))), source, damaged)
    receiver = Receiver()
    for message in messages[:-2] + messages[-1:]:
        receiver.take(message, answers.append)
    assert answers[-1]["whole"] is False
    assert not damaged.exists()
    assert not list(tmp_path.glob(".*partial"))
    for name in ("../x", "/x", ""):
        with pytest.raises(ValueError):
            safe_name(name)


def test_a_nodes_files_come_back(tmp_path: Path) -> None:
    node, here = RunDirectory.create(tmp_path / "node", "run"), RunDirectory.create(tmp_path / "here", "run")
    inbox, sent = Inbox(here), []

    def send(message: dict[str, Any]) -> None:
        sent.append(message)
        inbox.take(json.loads(json.dumps(message)))

    def save(step: int) -> Path:
        folder = node.checkpoint(step)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write_manifest(folder, step, {"config.json": file_entry(folder / "config.json")})
        point(node.checkpoints / "latest", folder.name)
        return folder

    outbox = Outbox(node, [0, 2], "launcher-000.log", send)
    node.rank_log(0).write_text("first\n")
    node.rank_log(1).write_text("another node sends this\n")
    node.metrics.write_text('{"step": 1}\n')
    save(1)
    flush(outbox)
    with node.rank_log(0).open("a") as log:
        log.write("second\n")
    (node.timeline / "step-1.json").write_text("{}")
    save(2)
    for path in node.checkpoint(1).iterdir():
        path.unlink()
    node.checkpoint(1).rmdir()
    flush(outbox)
    assert here.rank_log(0).read_text() == "first\nsecond\n"
    assert not here.rank_log(1).exists()
    assert here.metrics.read_text() == '{"step": 1}\n'
    assert (here.timeline / "step-1.json").exists()
    assert here.steps_saved() == [2]
    assert here.latest_checkpoint() == here.checkpoint(2)
    count = len(sent)
    flush(outbox)
    assert len(sent) == count, "what has not changed is not sent again"

    (save(3) / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"SHA-256 differs"):
        flush(outbox, in_this_thread=True)
    assert here.steps_saved() == [2]


def flush(outbox: Outbox, *, in_this_thread: bool = False) -> None:
    if in_this_thread:
        outbox._send_checkpoints()
        return
    outbox.flush()
    while not outbox.is_done():
        outbox.flush()
