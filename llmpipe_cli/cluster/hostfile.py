"""Hostfiles: which nodes a job runs on, and which devices of each.

    # comments and empty lines are left out
    node-1 slots=8
    ubuntu@10.0.0.2:2222 slots=8
    [fd00::3]:22 slots=4

A line names a node once, as ssh reaches it, and how many of its devices may be used (1 when left out). ``--include``
and ``--exclude`` choose nodes and devices as DeepSpeed does: ``node-1@node-2:0,2`` is all of node-1 and two devices of
node-2. Every mistake is told with its line. Nothing here reaches a node; `refuse_aliases` asks the resolver.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from llmpipe_cli.errors import UsageError

# Nothing that ssh could take for an option, and no character that a shell would act on.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9_.-]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE_HINT = "write one node a line: NAME slots=N, for example node-1 slots=8"


@dataclass(frozen=True)
class Host:
    """One node.

    Args:
        name: host name or address, as ssh reaches it.
        devices: indices of the devices to use; their number is the number of ranks.
        user: login name; None takes ssh's own.
        port: ssh port; None takes ssh's own.
        place: where it was written, ``hosts:3``.
    """

    name: str
    devices: tuple[int, ...]
    user: str | None = None
    port: int | None = None
    place: str = ""

    @property
    def slots(self) -> int:
        """Ranks on this node."""
        return len(self.devices)

    @property
    def target(self) -> str:
        """The destination for ssh."""
        return f"{self.user}@{self.name}" if self.user else self.name

    def __str__(self) -> str:
        return self.name


def read_hostfile(path: Path) -> list[Host]:
    """The nodes of a hostfile, in its order.

    Raises:
        UsageError: the file cannot be read, names no node, or a line has a mistake; `where` is ``file:line``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("there is no such hostfile", where=f"--hostfile {path}", hint=_LINE_HINT) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the hostfile cannot be read: {error}", where=f"--hostfile {path}") from error
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        host = _parse_line(words, f"{path}:{number}")
        for other in hosts:
            if (other.name.lower(), other.port) == (host.name.lower(), host.port):
                raise UsageError(
                    f"{host.name} stands here a second time, first at {other.place}",
                    where=host.place,
                    hint="give each node one line, with all its slots",
                )
        hosts.append(host)
    if not hosts:
        raise UsageError("the hostfile names no node", where=str(path), hint=_LINE_HINT)
    return hosts


def _parse_line(words: Sequence[str], place: str) -> Host:
    user, name, port = _parse_target(words[0], place)
    slots = 1
    seen: set[str] = set()
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in ("slots", "port"):
            raise UsageError(f"'{word}' is not understood", where=place, hint=_LINE_HINT)
        if key in seen:
            raise UsageError(f"{key}= stands here twice", where=place, hint=_LINE_HINT)
        seen.add(key)
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            what = "number of slots" if key == "slots" else "port"
            raise UsageError(f"'{value}' is not a {what}", where=place, hint=f"write {key}=1 or more")
        if key == "slots":
            slots = int(value)
        else:
            port = _port(value, place)
    if slots > 1024:
        raise UsageError(f"{slots} slots on one node are a mistake", where=place, hint="one slot is one device")
    return Host(name, tuple(range(slots)), user, port, place)


def _parse_target(text: str, place: str) -> tuple[str | None, str, int | None]:
    """``user@name:port`` in parts; an IPv6 address with a port stands in brackets."""
    user, at, rest = text.rpartition("@")
    if at and not _USER.fullmatch(user):
        raise UsageError(f"'{user}' is not a login name", where=place, hint=_LINE_HINT)
    port: int | None = None
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest)
    if bracketed:
        name = bracketed[1]
        valid = _is_ipv6(name)
        port = _port(bracketed[2], place) if bracketed[2] is not None else None
    elif rest.count(":") >= 2:
        name, valid = rest, _is_ipv6(rest)
    else:
        name, colon, number = rest.partition(":")
        valid = bool(_NAME.fullmatch(name))
        port = _port(number, place) if valid and colon else None
    if not valid:
        raise UsageError(f"'{text}' is not a host name or an address", where=place, hint=_LINE_HINT)
    return (user if at else None), name, port


def _is_ipv6(text: str) -> bool:
    if not _IPV6.fullmatch(text):
        return False
    try:
        socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except OSError:
        return False
    return True


def _port(text: str, place: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise UsageError(f"'{text}' is not a port", where=place, hint=f"ports are 1 to 65535; {_LINE_HINT}")
    return int(text)


def select(hosts: Sequence[Host], include: str | None, exclude: str | None) -> list[Host]:
    """The hosts and devices that ``--include`` names or that ``--exclude`` leaves.

    Args:
        hosts: all nodes.
        include: ``NAME[:DEVICE,...][@NAME...]``; None takes all.
        exclude: the same form; None leaves out nothing.

    Raises:
        UsageError: both are given, a name or device does not exist, or nothing is left.
    """
    if include and exclude:
        raise UsageError("--include and --exclude cannot stand together", where=f"--include {include}")
    if include:
        wanted = _parse_selection(include, hosts, "--include")
        chosen = [replace(host, devices=wanted[host.name] or host.devices) for host in hosts if host.name in wanted]
    elif exclude:
        unwanted = _parse_selection(exclude, hosts, "--exclude")
        chosen = []
        for host in hosts:
            left_out = unwanted.get(host.name, ())
            kept = host.devices if host.name not in unwanted else tuple(d for d in host.devices if d not in left_out)
            if kept and not (host.name in unwanted and not left_out):
                chosen.append(replace(host, devices=kept))
    else:
        return list(hosts)
    if not chosen:
        raise UsageError("no node is left", where=f"--exclude {exclude}", hint="exclude less")
    return chosen


def _parse_selection(text: str, hosts: Sequence[Host], flag: str) -> dict[str, tuple[int, ...]]:
    """Devices by host name; an empty tuple means all of them."""
    known = {host.name: host for host in hosts}
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, devices = part, ""
        if part not in known:
            name, _, devices = part.rpartition(":") if ":" in part else (part, "", "")
        name = name.strip("[]") if name not in known else name
        if name not in known:
            raise UsageError(
                f"there is no node '{name or part}' in the hostfile",
                where=f"{flag} {text}",
                hint=f"nodes are {', '.join(list(known)[:8])}",
            )
        if name in found:
            raise UsageError(f"{name} stands there twice", where=f"{flag} {text}", hint=f"write {name}:0,1")
        found[name] = _parse_devices(devices, known[name], f"{flag} {text}") if devices or part != name else ()
    return found


def _parse_devices(text: str, host: Host, where: str) -> tuple[int, ...]:
    numbers = text.split(",") if text else []
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise UsageError(f"'{text}' is not a list of devices", where=where, hint=f"write {host.name}:0,1")
    devices = tuple(sorted({int(number) for number in numbers}))
    if missing := [device for device in devices if device not in host.devices]:
        raise UsageError(
            f"{host.name} has no device {missing[0]}: its {host.slots} slots are numbered from 0",
            where=where,
            hint=f"see {host.place}",
        )
    return devices


def refuse_aliases(hosts: Sequence[Host]) -> None:
    """Refuse two names of one address. Names that only ssh's own configuration knows are left aside.

    Raises:
        UsageError: two lines lead to the same address and port.
    """
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        addresses = list(pool.map(_addresses, [host.name for host in hosts]))
    seen: dict[tuple[str, int], Host] = {}
    for host, found in zip(hosts, addresses, strict=True):
        for address in found:
            other = seen.setdefault((address, host.port or 22), host)
            if other is not host:
                raise UsageError(
                    f"{host.name} is the same machine as {other.name} at {other.place}: both are {address}",
                    where=host.place,
                    hint="give each node one line, with all its slots",
                )


def _addresses(name: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()
