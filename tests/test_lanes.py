"""Transfers over communicators that do everything in one order, as NCCL's: no schedule comes to a standstill."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction, Placement

AHEAD = 2
"""Receives that `engine.transfers.Receiver` has under way."""


@dataclass
class Message:
    """One end of a message: it can start when the pass before it is done."""

    edge: Hashable
    number: int
    after: int


@dataclass
class Rank:
    """What one rank has handed to its device: passes in order, messages in order for each communicator."""

    program: deque[Instruction]
    num_passes: int = 0
    num_done: int = 0
    waits: deque[tuple[Hashable, int] | None] = field(default_factory=deque)
    streams: dict[Hashable, deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    counts: dict[Any, int] = field(default_factory=lambda: defaultdict(int))


class Pipeline:
    """Plays a schedule on devices that start everything late: hosts hand over as much as `run_ahead` allows."""

    def __init__(self, name: str, stages: int, micro_batches: int, chunks: int, run_ahead: int, *, parity: bool = True):
        schedule = SCHEDULES[name]
        self.place = Placement(stages, schedule.chunks or chunks, schedule.turns)
        self.lanes: dict[int, Any] = dict(self.place.lanes())
        if not parity:
            self.lanes = {part: lane[1:] for part, lane in self.lanes.items()}
        self.micro_batches, self.run_ahead = micro_batches, run_ahead
        self.ranks = [Rank(deque(schedule(stage, stages, micro_batches, chunks))) for stage in range(stages)]
        self.arrived: set[tuple[Hashable, int]] = set()
        for stage, rank in enumerate(self.ranks):
            for part in self.lanes:
                if self.place.owner(part)[0] == stage:
                    self._post(rank, ("F", part), micro_batches)

    def finishes(self) -> bool:
        """Whether everything is done in the end."""
        while any([self._hand_over(stage) for stage in range(len(self.ranks))] + [self._work()]):
            pass
        return all(not rank.program and rank.num_done == rank.num_passes for rank in self.ranks)

    def _post(self, rank: Rank, edge: tuple[str, int], announced: int) -> None:
        """Start receives of an edge, as far ahead as may be."""
        taken, posted = rank.counts["taken", edge], rank.counts["posted", edge]
        for number in range(posted, min(announced, taken + AHEAD)):
            self._start(rank, edge, number)
            rank.counts["posted", edge] += 1
        rank.counts["announced", edge] = announced

    def _start(self, rank: Rank, edge: tuple[str, int], number: int) -> None:
        rank.streams[edge[0], self.lanes[edge[1]]].append(Message(edge, number, rank.num_passes))

    def _receive(self, rank: Rank, edge: tuple[str, int]) -> tuple[Hashable, int]:
        number = rank.counts["taken", edge]
        rank.counts["taken", edge] += 1
        self._post(rank, edge, rank.counts["announced", edge])
        return edge, number

    def _send(self, rank: Rank, edge: tuple[str, int]) -> None:
        self._start(rank, edge, rank.counts["sent", edge])
        rank.counts["sent", edge] += 1

    def _hand_over(self, stage: int) -> bool:
        """The host's next instruction, unless it is far enough ahead."""
        rank = self.ranks[stage]
        if not rank.program or rank.num_passes - rank.num_done > self.run_ahead:
            return False
        kind, _, chunk = rank.program.popleft()
        part = self.place.part(stage, chunk)
        into = {"F": ("F", part), "B": ("B", part + 1), "I": ("B", part + 1)}.get(kind)
        wait = self._receive(rank, into) if into is not None and into[1] in self.lanes else None
        rank.waits.append(wait)
        rank.num_passes += 1
        if kind == "F" and part + 1 in self.lanes:
            self._send(rank, ("F", part + 1))
            self._post(rank, ("B", part + 1), rank.counts["announced", ("B", part + 1)] + 1)
        elif kind in "BI" and part in self.lanes:
            self._send(rank, ("B", part))
        return True

    def _work(self) -> bool:
        """Let every device do what can be done."""
        moved = False
        for rank in self.ranks:
            while rank.waits and (rank.waits[0] is None or rank.waits[0] in self.arrived):
                rank.waits.popleft()
                rank.num_done += 1
                moved = True
        heads: dict[tuple[Hashable, int], list[deque[Message]]] = defaultdict(list)
        for rank in self.ranks:
            for stream in rank.streams.values():
                if stream and stream[0].after <= rank.num_done:
                    heads[stream[0].edge, stream[0].number].append(stream)
        for key, ends in heads.items():
            if len(ends) == 2:
                self.arrived.add(key)
                for stream in ends:
                    stream.popleft()
                moved = True
        return moved


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_comes_to_its_end(name: str) -> None:
    generator = random.Random(name)
    for _ in range(60):
        stages, micro_batches, chunks = generator.randint(1, 8), generator.randint(1, 20), generator.randint(2, 4)
        for run_ahead in (0, 2, 1000):
            assert Pipeline(name, stages, micro_batches, chunks, run_ahead).finishes(), (stages, micro_batches, chunks)


def test_one_communicator_for_all_stages_would_stand_still() -> None:
    """What `Placement.lanes` keeps apart has to be apart."""
    assert not Pipeline("1f1b", 4, 8, 1, 1000, parity=False).finishes()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_sends_to_one_other_or_receives_from_one(name: str) -> None:
    for stages in range(1, 9):
        for chunks in [SCHEDULES[name].chunks] if SCHEDULES[name].chunks else [2, 3, 4]:
            place = Placement(stages, chunks, SCHEDULES[name].turns)
            roles = defaultdict(set)
            for part, lane in place.lanes().items():
                before, after = place.owner(part - 1)[0], place.owner(part)[0]
                roles[before, lane].add(("sends", after))
                roles[after, lane].add(("receives", before))
            assert all(len(found) == 1 for found in roles.values())
