"""What all ranks of a learner do together: the first one runs the loop and says what is next, the others follow.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| the first rank's next order | its share of a step, version, checkpoint | the first rank's loop | the last order |
"""

import logging
from contextlib import suppress
from enum import StrEnum

from learner.checkpoint import Checkpoints
from learner.collate import Batch
from learner.distributed import ALONE, Ranks
from learner.errors import RankLost
from learner.publisher import Publisher
from learner.settings import LearnerSettings
from learner.snapshot import take_snapshot
from learner.step import SKIPPED, Trainer

log = logging.getLogger(__name__)


class Order(StrEnum):
    """What is next, when it is not a batch to train on."""

    WAIT = "wait"
    """Nothing yet; so the others know that the first rank lives, however long it waits for data."""
    PUBLISH = "publish"
    SAVE = "save"
    END = "end"


def begin_version(trainer: Trainer, publisher: Publisher, settings: LearnerSettings, *, ranks: Ranks = ALONE) -> None:
    """Begin to publish the weights at hand, each rank its share. Raises as Publisher.begin."""
    snapshot = take_snapshot(
        trainer.policy, dtype=settings.publish_dtype, tolerance_nats=settings.probe_tolerance_nats, ranks=ranks
    )
    publisher.begin(snapshot, version=trainer.progress.clock)


def follow(
    trainer: Trainer, publisher: Publisher, checkpoints: Checkpoints, settings: LearnerSettings, *, ranks: Ranks
) -> None:
    """Do what the first rank's loop does, until its end.

    Raises RankLost when the first rank is gone, and what the first rank's own step, version or checkpoint raises.
    """
    while (order := _next_order(ranks)) != Order.END:
        if isinstance(order, Batch):
            with suppress(*SKIPPED):  # on all ranks alike; the first one counts and says so
                trainer.update(order)
        elif order == Order.PUBLISH:
            begin_version(trainer, publisher, settings, ranks=ranks)
        elif order == Order.SAVE:
            checkpoints.save(trainer)
    publisher.flush()


def _next_order(ranks: Ranks) -> object:
    try:
        return ranks.from_first(None)
    except RuntimeError as error:  # what torch.distributed makes of a closed connection
        raise RankLost(
            f"rank {ranks.rank} ends: the first rank is gone", hint="see what it, or torchrun, says"
        ) from error
