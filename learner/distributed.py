"""The processes that train one model together: torchrun's ranks, or this process alone."""

from dataclasses import dataclass

import torch.distributed as dist


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


ALONE = Ranks()
"""One process."""
