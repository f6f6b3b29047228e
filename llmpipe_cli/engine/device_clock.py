"""Times of what an accelerator did, for the recorder of a rank that hands it work."""

from __future__ import annotations

import torch

from llmpipe_cli.engine.recorder import Clock


class DeviceClock(Clock):
    """Moments of the current stream: each is when the device has done what the host had handed over by then.

    A stream that waits for a message stands still, so what a pass waits for and what it computes can be told apart. The
    events are kept and used again in the next step; who waits for one leaves the core to others.
    """

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._used = 0

    def restart(self) -> None:
        self._used = 0

    def moment(self) -> torch.cuda.Event:
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True, blocking=True))
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000

    def is_past(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()


def clock_of(device: torch.device) -> Clock:
    """The clock that tells what a device does; the host's own for a processor, which works as it is told."""
    return DeviceClock() if device.type == "cuda" else Clock()
