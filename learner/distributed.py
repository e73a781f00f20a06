"""The processes that train one model together: torchrun's ranks, or this process alone."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.collate import Batch, Distribution, Kept

_WIRE_TYPES: list[Any] = [Batch, Distribution, Kept]
"""What ranks send each other besides tensors, texts and numbers; nothing else is ever unpickled."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this one is. Alone it needs no process group, and every method does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process talks to the service and to the disk for all."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, the same on each."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: object) -> object:
        """Return what the first rank gives; the others' value is not looked at."""
        if self.size == 1:
            return value
        buffer = io.BytesIO()
        if self.is_first:
            torch.save(value, buffer)
        length = torch.tensor([buffer.tell()])
        dist.broadcast(length, src=0)
        content = torch.frombuffer(bytearray(buffer.getvalue() or int(length)), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        with torch.serialization.safe_globals(_WIRE_TYPES):
            return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


ALONE = Ranks()
"""One process."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join torchrun's process group for this block; without torchrun this process is alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which this rank may hold a part. With several ranks all of them make this call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
