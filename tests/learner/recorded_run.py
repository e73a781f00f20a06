"""A learner on 20 recorded batches; as a process: python -m tests.learner.recorded_run MODEL_DIR RUN_DIR PAUSE_AT.

After update PAUSE_AT it says so and waits to be killed.
"""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from buffer.table import SampleRequest, TableStats, Wait
from buffer.trained import TrainedGroup
from buffer.types import Sample
from buffer.weights.directory_store import DirectoryWeightStore
from learner.admission import Admission
from learner.checkpoint import Checkpoints
from learner.loop import LearnerLoop, take_up
from learner.publisher import Publisher
from learner.sampling import Prefetcher, selector_schedule
from learner.settings import LearnerSettings
from learner.step import Progress, Trainer
from tests.factories import RUN_ID
from tests.learner.builders import VOCAB, make_trainer, plain_samples
from tests.learner.stores import AtOnce

UPDATES = 20
FINGERPRINT = "f" * 64


@dataclass
class _Recording:
    """The batches, handed out from where a checkpoint left off."""

    next_number: int

    def draw(self, request: SampleRequest) -> list[Sample]:
        self.next_number += 1
        return plain_samples(self.next_number - 1)

    def stats(self) -> TableStats:
        raise AssertionError("a recording is never empty")


@dataclass(frozen=True)
class _Pausing:
    pause_at: int | None

    def update(self, progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        if progress.updates == self.pause_at:
            sys.stdout.write("paused\n")
            sys.stdout.flush()
            threading.Event().wait()

    def waiting(self, progress: Progress, wait: Wait, counts: Mapping[str, float]) -> None:
        """A recording makes nobody wait."""

    def skipped(self, progress: Progress, counts: Mapping[str, float]) -> None:
        raise AssertionError("no batch of a recording is bad")


def train_recorded(model_dir: Path, run_dir: Path, *, pause_at: int | None = None) -> Trainer:
    """Go on from the newest checkpoint of the run, if there is one, to the end of the recording."""
    trainer = make_trainer(model_dir, objective="stalewise", reference_reset_every=6)
    settings = LearnerSettings(groups_per_update=2, total_updates=UPDATES, checkpoint_every=10)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2, model_fingerprint=FINGERPRINT, resolved_settings={})
    store = DirectoryWeightStore(run_dir / "weights")
    publisher = Publisher(
        store,
        run_id=RUN_ID,
        model_fingerprint=FINGERPRINT,
        keyframe_every=20,
        executor=AtOnce(),
        unix_time=time.time,
    )
    take_up(trainer, checkpoints, publisher, resume=True)
    recording = _Recording(trainer.progress.updates)
    LearnerLoop(
        trainer=trainer,
        prefetcher=Prefetcher(
            recording.draw,
            recording.stats,
            settings,
            clock=lambda: trainer.progress.clock,
            schedule=selector_schedule(settings, updates_done=trainer.progress.updates),
            request_prefix="recorded",
            now=time.monotonic,
        ),
        admission=Admission(max_age_updates=None, vocab_size=VOCAB, max_positions=64),
        publisher=publisher,
        checkpoints=checkpoints,
        reporter=_Pausing(pause_at),
        settings=settings,
        stop=threading.Event(),
        now=time.monotonic,
    ).run()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_recorded(Path(sys.argv[1]), Path(sys.argv[2]), pause_at=int(sys.argv[3]))
