"""Tensors between neighbouring stages, asynchronously.

Activations travel to the next stage over one process group and gradients to the previous one over another, so that
each communicator carries messages in one direction and in one order (`engine.communicators`). Receives
are posted before they are needed into fresh tensors; a sent tensor is kept alive until its request is done; nothing
waits before its data is needed.

Between two chunks of the same stage nothing travels: a `Handover` is both ends.

On slow links fp32 tensors can travel as bf16 (`wire`): they are rounded when sent and widened when received.

Both ends know the batch a message belongs to. Shapes are therefore sent only once for every new combination of input
shapes: the sender puts a header in front, and both ends remember it under the same key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

from llmpipe_cli.errors import RankError

_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool]
_MAX_DIMS = 6
_FIELDS = 2 + _MAX_DIMS  # dtype, number of dimensions, sizes

Spec = tuple[torch.dtype, tuple[int, ...]]


def batch_key(batch: dict[str, torch.Tensor]) -> Hashable:
    """What decides the shapes of all activations of a micro-batch: the names and shapes of its inputs."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())


def _encode(specs: Sequence[Spec]) -> torch.Tensor:
    """Specs as one int64 tensor of shape [len(specs), _FIELDS]."""
    header = torch.zeros(len(specs), _FIELDS, dtype=torch.int64)
    for row, (dtype, shape) in zip(header, specs, strict=True):
        row[0], row[1] = _DTYPES.index(dtype), len(shape)
        row[2 : 2 + len(shape)] = torch.tensor(shape, dtype=torch.int64)
    return header


def _decode(header: torch.Tensor) -> list[Spec]:
    return [(_DTYPES[row[0]], tuple(row[2 : 2 + row[1]])) for row in header.tolist()]


def _on_wire(dtype: torch.dtype, wire: torch.dtype | None) -> torch.dtype:
    """What a tensor of this dtype travels as."""
    return wire if wire is not None and dtype == torch.float32 else dtype


class Sender:
    """Sends groups of tensors to one peer and keeps them alive until they are gone.

    Args:
        peer: global rank of the receiver.
        group: process group of this direction.
        device: device of header tensors.
        wire: what fp32 tensors travel as, if not as they are.
    """

    def __init__(
        self, peer: int, group: dist.ProcessGroup, device: torch.device, wire: torch.dtype | None = None
    ) -> None:
        self._peer, self._group, self._device, self._wire = peer, group, device, wire
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._known: set[Hashable] = set()

    def send(self, tensors: Sequence[torch.Tensor], key: Hashable | None) -> None:
        """Start sending `tensors`; a header goes first when `key` is new. A key of None never needs a header."""
        if key is not None and key not in self._known:
            self._known.add(key)
            specs = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
            self._start(_encode(specs).to(self._device))
        for tensor in tensors:
            detached = tensor.detach()
            self._start(detached.to(_on_wire(tensor.dtype, self._wire)).contiguous())
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()

    def _start(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            work = dist.isend(tensor, self._peer, group=self._group)
            assert work is not None, "this rank is not in the group"
            self._pending.append((work, tensor))

    def finish(self) -> None:
        """Wait until everything has left."""
        while self._pending:
            self._pending.popleft()[0].wait()


class Receiver:
    """Receives groups of tensors from one peer in the order in which they were announced.

    Args:
        peer: global rank of the sender.
        group: process group of this direction.
        device: device of the received tensors.
        num_tensors: tensors in a group when the shapes come with a header.
        ahead: groups that may be in flight before the first one is asked for.
        wire: what fp32 tensors travel as, if not as they are.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        device: torch.device,
        num_tensors: int = 0,
        ahead: int = 2,
        wire: torch.dtype | None = None,
    ) -> None:
        self._peer, self._group, self._device, self._wire = peer, group, device, wire
        self._num_tensors, self._ahead = num_tensors, ahead
        self._known: dict[Hashable, list[Spec]] = {}
        self._announced: deque[tuple[Hashable | None, list[Spec] | None]] = deque()
        self._posted: deque[list[tuple[torch.Tensor, dist.Work | None, torch.dtype]]] = deque()

    def announce(self, key: Hashable | None, specs: list[Spec] | None = None) -> None:
        """Say that a group will come next: by `key` when a header tells its shapes, or by its `specs`."""
        self._announced.append((key, specs))
        self._post_ahead()

    def receive(self) -> list[torch.Tensor]:
        """The oldest announced group; waits until it is here."""
        if not self._posted:
            key, specs = self._announced.popleft()
            specs = self._specs(key, specs)
            self._posted.append(self._post(self._receive_header(key) if specs is None else specs))
        tensors = []
        for tensor, work, dtype in self._posted.popleft():
            if work is not None:
                work.wait()
            tensors.append(tensor.to(dtype))
        self._post_ahead()
        return tensors

    def _specs(self, key: Hashable | None, specs: list[Spec] | None) -> list[Spec] | None:
        return specs if specs is not None else self._known.get(key)

    def _post_ahead(self) -> None:
        while self._announced and len(self._posted) < self._ahead:
            key, specs = self._announced[0]
            specs = self._specs(key, specs)
            if specs is None:
                return  # its header comes first, and only when everything before it has been taken
            self._announced.popleft()
            self._posted.append(self._post(specs))

    def _post(self, specs: list[Spec]) -> list[tuple[torch.Tensor, dist.Work | None, torch.dtype]]:
        posted = []
        for dtype, shape in specs:
            tensor = torch.empty(shape, dtype=_on_wire(dtype, self._wire), device=self._device)
            work = dist.irecv(tensor, self._peer, group=self._group) if tensor.numel() else None
            posted.append((tensor, work, dtype))
        return posted

    def _receive_header(self, key: Hashable) -> list[Spec]:
        header = torch.zeros(self._num_tensors, _FIELDS, dtype=torch.int64, device=self._device)
        dist.recv(header, self._peer, group=self._group)
        specs = _decode(header)
        if any(dim < 0 for _, shape in specs for dim in shape):
            raise RankError(f"rank {self._peer} announced activations of impossible shapes: {specs}")
        self._known[key] = specs
        return specs


class Handover:
    """Groups of tensors from one part of the model to the next on the same stage: sender and receiver in one."""

    def __init__(self) -> None:
        self._waiting: deque[list[torch.Tensor]] = deque()

    def send(self, tensors: Sequence[torch.Tensor], key: Hashable | None) -> None:
        """Keep the tensors until they are received."""
        self._waiting.append([tensor.detach() for tensor in tensors])

    def finish(self) -> None:
        """Nothing is under way."""

    def announce(self, key: Hashable | None, specs: list[Spec] | None = None) -> None:
        """Nothing is to be prepared."""

    def receive(self) -> list[torch.Tensor]:
        """The oldest group."""
        return self._waiting.popleft()
