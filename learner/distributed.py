"""The processes that train one model together: torchrun's ranks, or this process alone."""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from buffer.errors import InvalidSettings
from learner.collate import Batch, Distribution, Kept

_WIRE_TYPES: list[Any] = [Batch, Distribution, Kept]
"""What ranks send each other besides tensors, texts and numbers; nothing else is ever unpickled."""
TRANSFER_TIMEOUT = timedelta(days=1)
"""How long a rank that has sent its part of a version waits for the others: longer than any upload takes."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this one is. Alone it needs no process group, and every method does nothing."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """What they talk over; None = the group of `joined`."""

    @property
    def is_first(self) -> bool:
        """Whether this process talks to the service and to the disk for all."""
        return self.rank == 0

    def beside(self) -> "Ranks":
        """Return the same ranks with a line of their own, for a thread that works beside the main one.

        All ranks make this call. The line carries tensors on the CPU; a wait on it may take TRANSFER_TIMEOUT.
        """
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TRANSFER_TIMEOUT))

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, the same on each."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def from_first(self, value: object) -> object:
        """Return what the first rank gives; the others' value is not looked at."""
        if self.size == 1:
            return value
        if self.is_first:
            content = _packed(value)
            dist.broadcast(torch.tensor([len(content)]), src=0, group=self.group)
            dist.broadcast(content, src=0, group=self.group)
            return value
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, src=0, group=self.group)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self.group)
        return _unpacked(content)

    def from_all(self, value: object) -> list[object]:
        """Return what each rank gives, by rank, the same on all."""
        if self.size == 1:
            return [value]
        content = _packed(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self.group)
        longest = int(torch.cat(lengths).max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        contents = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(contents, padded, group=self.group)
        return [_unpacked(of_rank[: int(length)]) for of_rank, length in zip(contents, lengths, strict=True)]


ALONE = Ranks()
"""One process."""


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join torchrun's process group for this block; without torchrun this process is alone.

    With a device of cuda each rank of a machine gets a GPU as the current one; raises InvalidSettings when there are
    fewer GPUs than ranks. A rank that leaves the block by an error leaves the others without an answer: they end by the
    closed connection, or by torchrun, whichever comes first.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    _end_with_parent()
    on_gpus = device == "cuda" and torch.cuda.is_available()
    if on_gpus:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    # for good: torch's context manager for it is one list for all threads, and the publisher's reads messages, too
    torch.serialization.add_safe_globals(_WIRE_TYPES)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    yield Ranks(rank=dist.get_rank(), size=size)
    dist.destroy_process_group()  # not after an error: it may wait for ranks that are gone


def _take_gpu(number: int) -> None:
    if number >= torch.cuda.device_count():
        raise InvalidSettings(
            f"rank {number} of this machine has no GPU: there are {torch.cuda.device_count()}",
            hint="start torchrun with as many processes a machine as it has GPUs",
        )
    torch.cuda.set_device(number)


def _end_with_parent() -> None:
    """Have the kernel kill this process when torchrun dies, kill -9 included; Linux only.

    Ranks are in sessions of their own. Left behind, they would go on beside the run that is started in their place.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _packed(value: object) -> Tensor:
    """[bytes] uint8"""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(content: Tensor) -> object:
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which this rank may hold a part. With several ranks all of them make this call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
