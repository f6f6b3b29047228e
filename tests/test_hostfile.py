"""Hostfiles and the choice of nodes: what is accepted, the line that every mistake is told with, what nodes lack."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpipe_cli.cluster.facts import node_facts
from llmpipe_cli.cluster.hostfile import Host, read_hostfile, refuse_aliases, select
from llmpipe_cli.cluster.preflight import judge_facts
from llmpipe_cli.errors import UsageError

ROOT = Path(__file__).parent.parent


def read(tmp_path: Path, text: str) -> list[Host]:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return read_hostfile(path)


def test_all_that_is_accepted(tmp_path: Path) -> None:
    text = "# cluster\n\nnode-1 slots=2 # rack 1\nubuntu@10.0.0.2:2222\n[fd00::3]:23 slots=1\nroot@fd00::4 port=24\n"
    hosts = read(tmp_path, text)
    assert [(host.user, host.name, host.port, host.devices) for host in hosts] == [
        (None, "node-1", None, (0, 1)),
        ("ubuntu", "10.0.0.2", 2222, (0,)),
        (None, "fd00::3", 23, (0,)),
        ("root", "fd00::4", 24, (0,)),
    ]
    assert [host.place.rsplit(":", 1)[1] for host in hosts] == ["3", "4", "5", "6"]
    assert hosts[3].target == "root@fd00::4"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a slots=1\nb slots=0\n", 2, "'0' is not a number of slots"),
        ("a slots=4x\n", 1, "'4x' is not a number of slots"),
        ("a slots=-1\n", 1, "'-1' is not a number of slots"),
        ("a slots=²\n", 1, "'²' is not a number of slots"),
        ("a slot=4\n", 1, "'slot=4' is not understood"),
        ("a 4\n", 1, "'4' is not understood"),
        ("a slots=1 slots=2\n", 1, "slots= stands here twice"),
        ("a slots=1\n\nA slots=1\n", 3, "A stands here a second time"),
        ("-oProxyCommand=touch slots=1\n", 1, "'-oProxyCommand=touch' is not a host name"),
        ("-oProxyCommand=x@a\n", 1, "'-oProxyCommand=x' is not a login name"),
        ("root@-oProxyCommand=x\n", 1, "is not a host name"),
        ("$(id)\n", 1, "'$(id)' is not a host name"),
        ("a;id\n", 1, "'a;id' is not a host name"),
        ("a:0\n", 1, "'0' is not a port"),
        ("[fd00::1]:70000\n", 1, "'70000' is not a port"),
        ("fd00:::1\n", 1, "is not a host name or an address"),
        ("# nothing\n", None, "names no node"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert caught.value.exit_code == 2
    assert message in caught.value.message
    assert caught.value.where == str(tmp_path / "hosts") + (f":{line}" if line else "")


def test_missing_and_aliases(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such hostfile"):
        read_hostfile(tmp_path / "hots")
    hosts = read(tmp_path, "127.0.0.1 slots=1\nlocalhost slots=1\n")
    with pytest.raises(UsageError, match=r"hosts:2: localhost is the same machine as 127\.0\.0\.1 at .*hosts:1"):
        refuse_aliases(hosts)
    refuse_aliases(read(tmp_path, "127.0.0.1 slots=1\nlocalhost:2222 slots=1\nonly-ssh-knows-it\n"))


def test_include_and_exclude(tmp_path: Path) -> None:
    hosts = read(tmp_path, "a slots=4\nb slots=4\nfd00::3 slots=2\n")

    def chosen(include: str | None = None, exclude: str | None = None) -> dict[str, tuple[int, ...]]:
        return {host.name: host.devices for host in select(hosts, include, exclude)}

    assert chosen("b@a:0,2") == {"a": (0, 2), "b": (0, 1, 2, 3)}
    assert chosen(exclude="b@a:0") == {"a": (1, 2, 3), "fd00::3": (0, 1)}
    assert chosen("fd00::3") == {"fd00::3": (0, 1)}
    assert chosen("[fd00::3]:1") == {"fd00::3": (1,)}
    assert chosen(exclude="a@b@[fd00::3]:1") == {"fd00::3": (0,)}
    for include, exclude, message in [
        ("c", None, "there is no node 'c'"),
        ("a:9", None, "a has no device 9"),
        ("a:x", None, "'x' is not a list of devices"),
        ("a@a", None, "stands there twice"),
        ("a", "b", "cannot stand together"),
        (None, "a@b@fd00::3", "no node is left"),
    ]:
        with pytest.raises(UsageError, match=message):
            chosen(include, exclude)


def test_what_the_facts_of_nodes_say(tmp_path: Path) -> None:
    """This machine's own facts, with two GPUs, little disk and a wrong clock put in."""
    facts = node_facts(str(tmp_path), str(tmp_path))
    device = {"kind": "cuda", "count": 2, "name": "gpu", "memory_bytes": 1 << 30}
    gpus = facts | {"devices": device, "identity": "another", "free_bytes": {"/runs": 1 << 20}}
    fits = judge_facts([Host("a", (0, 1))], [gpus], [0.0])
    assert not fits.problems
    assert fits.warnings == ["a has only 0.0 GB left in /runs"]
    crowded = judge_facts([Host("a", (0, 1, 2), place="hosts:1")], [gpus], [-7.5])
    assert [(one.exit_code, one.where) for one in crowded.problems] == [(3, "hosts:1")]
    assert "a has 2 devices (gpu), the hostfile asks for 3" in crowded.problems[0].message
    assert "the clock of a is -7.5 s off this machine's: use NTP or chrony" in crowded.warnings
    mixed = judge_facts([Host("a", (0,)), Host("b", (0,))], [gpus, facts], [0.0, 0.0])
    assert any("another kind" in one.message for one in mixed.problems)
    for package in ("deepspeed", "llmpipe"):
        older = gpus | {"versions": gpus["versions"] | {package: "0.0.1"}}
        (problem,) = judge_facts([Host("a", (0,))], [older], [0.0]).problems
        assert problem.exit_code == 3
        assert problem.message == f"a has {package} 0.0.1, this machine has {facts['versions'][package]}"


def test_the_examples_can_be_read() -> None:
    for path in (ROOT / "hostfiles").glob("*.txt"):
        assert read_hostfile(path), path
