"""Batches from the table: which selector for which draw, drawn ahead by a thread of its own."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from buffer.errors import DrawLost
from buffer.selectors import Selector
from buffer.table import SampleRequest, TableStats
from buffer.types import PolicyVersion, Sample
from learner.collate import Batch, collate
from learner.settings import LearnerSettings

log = logging.getLogger(__name__)

EMPTY_ANSWER_PAUSE_S = 0.05
"""Pause after an empty answer: a table in this process answers at once, one over HTTP has waited already."""
SLOW_ANSWER_S = 3.0
"""Beyond the wait that was asked for, an answer this late means that the service is away."""


def selector_schedule(settings: LearnerSettings, *, updates_done: int) -> Iterator[Selector]:
    """Yield the selector of each coming draw: one by `selector`, then `replay_updates` by `replay_selector`."""
    period = settings.replay_updates + 1
    draw = updates_done
    while True:
        yield settings.selector if draw % period == 0 else settings.replay_selector
        draw += 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What the table handed out, and the same as a batch: decoded and padded while the step before ran."""

    samples: list[Sample]
    batch: Batch
    clock: PolicyVersion
    """The learner's clock that the ages of the batch are measured against."""


class Prefetcher:
    """Draws batches ahead in a thread. Made, entered, taken from and left by the learner's loop alone.

    The thread waits for a ticket (one is given by each `take`, `prefetch_batches` at the start), then for the table.
    `take` waits for the thread. Leaving the context wakes the thread, which ends after the request in flight.
    `draw` answers [] while the table cannot serve; then `stats` is asked why.
    """

    def __init__(
        self,
        draw: Callable[[SampleRequest], list[Sample]],
        stats: Callable[[], TableStats],
        settings: LearnerSettings,
        *,
        clock: Callable[[], PolicyVersion],
        schedule: Iterator[Selector],
        request_prefix: str,
        now: Callable[[], float],
    ) -> None:
        self._draw_batch = draw
        self._stats = stats
        self._settings = settings
        self._clock = clock
        self._schedule = schedule
        self._request_prefix = request_prefix
        self._now = now
        self.lost_draws = 0
        """Draws whose answer was lost, and their groups with it before it could be given again."""
        self._answered_s = now()
        self._why_empty = "no answer yet"
        self._left = threading.Event()
        self._tickets = threading.Semaphore(settings.prefetch_batches)
        self._batches: queue.Queue[Draw | Exception] = queue.Queue()
        self._owed = 0  # tickets that `take` gave and has no batch for yet
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._tickets.release()
        self._thread.join(timeout=2 * self._settings.sample_timeout_s)
        unused = sum(len(draw.samples) for draw in self._batches.queue if isinstance(draw, Draw))
        if unused:
            log.info("%d groups were drawn ahead and are not trained on", unused)

    @property
    def reason(self) -> str:
        """Why there is no batch: by the table's own account, or because the service is silent."""
        silent_s = self._now() - self._answered_s
        if silent_s > self._settings.sample_timeout_s + SLOW_ANSWER_S:
            return f"the service has not answered for {silent_s:.0f} s"
        return self._why_empty

    def take(self, *, timeout_s: float) -> Draw | None:
        """Return the next batch, or None when there is none in time. Raises what drawing it raised."""
        if not self._owed:
            self._owed = 1
            self._tickets.release()
        try:
            batch = self._batches.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(batch, Exception):
            raise batch
        self._owed = 0
        return batch

    def _run(self) -> None:
        for number, selector in enumerate(self._schedule):
            self._tickets.acquire()
            self._answered_s = self._now()  # silence counts from the first request of a draw
            try:
                draw = self._draw(f"{self._request_prefix}-{number}", selector)
            except Exception as error:  # noqa: BLE001 the learner would wait for ever for a thread that died in silence
                self._batches.put(error)
                return
            if draw is None:
                return
            self._batches.put(draw)

    def _draw(self, request_id: str, selector: Selector) -> Draw | None:
        """Ask until the table hands out a batch; None when the context was left meanwhile."""
        # one request for all attempts: a draw whose answer was lost is given again, and only to the same request
        request = SampleRequest(
            num_groups=self._settings.groups_per_update,
            learner_version=self._clock(),
            request_id=request_id,
            selector=selector,
        )
        while not self._left.is_set():
            try:
                samples = self._draw_batch(request)
            except DrawLost as error:
                self.lost_draws += 1
                log.warning("%s; drawing anew", error)
                request = request.model_copy(update={"request_id": f"{request_id}-after-{self.lost_draws}-lost"})
                continue
            if samples:
                clock = self._clock()
                return Draw(samples, collate(samples, clock=clock), clock)
            self._why_empty = _why_empty(self._stats())
            self._answered_s = self._now()
            self._left.wait(EMPTY_ANSWER_PAUSE_S)
        return None


def _why_empty(stats: TableStats) -> str:
    told = [wait.reason for wait in stats.waits if wait.who == "learner"]
    stored = f"{stats.num_groups} groups stored, {stats.num_fresh} of them fresh"
    return f"{told[0]} ({stored})" if told else stored
