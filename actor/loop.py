"""The actor's loop: generate groups, deliver groups; no tensor is touched here.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a task; admission (a 429 pauses) | groups; their outcomes | learner sampling, eviction | finish or drop, never half |

Weights are awaited before each batch (`weight_sync`). With `batches_in_flight` several are drawn at once (`in_flight`).
A service that is away does not stop generation while the spool has room; an actor that was refused (`full`) never
spools: it waits.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from actor.backoff import Backoff
from actor.evaluate import Evaluator
from actor.in_flight import BatchesInFlight
from actor.rollout import Rollouts
from actor.settings import ActorSettings
from actor.spool import Spool
from actor.status import Activity, Status
from actor.weight_sync import UNREACHABLE, WeightSync
from buffer.client import Submission
from buffer.errors import CorruptWeights, EngineUnreachable
from buffer.types import Group, InsertOutcome, InsertResult

log = logging.getLogger(__name__)

WAKE_S = 0.5
"""How often a loop that waits for weights looks whether it was told to stop."""

_REFUSED = frozenset({InsertOutcome.CONFLICT, InsertOutcome.OVERSIZE, InsertOutcome.INVALID})
"""Outcomes that say that something is wrong; `stale` and `duplicate` happen on a good day."""


class Inbox(Protocol):
    """Where groups go: buffer.client.HttpTable."""

    def submit(self, groups: Sequence[Group]) -> Submission:
        """Insert groups and learn how long to pause. Raises ServiceUnreachable, StoreUnavailable."""
        ...


class ActorLoop:
    """Runs until `stop` is set, or the weight sync ends with an error."""

    def __init__(
        self,
        *,
        rollouts: Rollouts,
        evaluator: Evaluator,
        inbox: Inbox,
        spool: Spool,
        sync: WeightSync,
        status: Status,
        settings: ActorSettings,
        stop: threading.Event,
        now: Callable[[], float],
        jitter: random.Random,
    ) -> None:
        self._rollouts = rollouts
        self._evaluator = evaluator
        self._inbox = inbox
        self._spool = spool
        self._sync = sync
        self._status = status
        self._settings = settings
        self._stop = stop
        self._now = now
        self._jitter = jitter
        self._away = Backoff(settings.retry_s, jitter)
        self._retry_at_s: float | None = None
        """When to try a service that is away again; None while it answers."""
        self._problem: type[Exception] | None = None  # that was said

    def run(self) -> None:
        """Generate and deliver. Raises what ended the weight sync, and what the engine or the task raise."""
        self._deliver([])  # what a former process left in the spool
        num_batches = self._settings.batches_in_flight
        if num_batches == 1:
            self._run(self._generate)
            return
        with BatchesInFlight(
            self._generate, num_batches=num_batches, deliver=self._deliver, stop=self._stop
        ) as batches:
            self._run(batches.next_batch)

    def _run(self, next_batch: Callable[[], list[Group]]) -> None:
        while not self._stop.is_set():
            if self._weights_are_ready():
                self._evaluate()
                self._note_generating()
                self._deliver(next_batch())

    def _weights_are_ready(self) -> bool:
        if self._sync.quarantine_reason:
            self._status.enter(Activity.QUARANTINED, self._sync.quarantine_reason)
        elif self._sync.verified_version < 0:
            self._status.enter(Activity.WAITING_WEIGHTS, "no version loaded yet")
        return self._sync.wait_ready(WAKE_S)

    def _evaluate(self) -> None:
        """Evaluate the version in use if it is this actor's turn; what it drew is offered once, without waiting."""
        try:
            with self._sync.held() as version:
                if version < 0 or not self._evaluator.has_turn(version):
                    return
                self._status.enter(Activity.EVALUATING, f"version {version}")
                groups = self._evaluator.evaluate(version)
            self._status.drew(sum(group.num_response_tokens for group in groups))
            for result in self._inbox.submit(groups).results:
                self._tally(result)
        except (*UNREACHABLE, CorruptWeights, EngineUnreachable) as error:  # an engine's weights are loaded again
            log.warning("no evaluation: %s", error)

    def _note_generating(self) -> None:
        if self._retry_at_s is None:
            self._status.enter(Activity.GENERATING)
        else:
            self._status.enter(Activity.SPOOLING, f"{self._spool.num_groups} groups wait to be delivered")

    def _generate(self) -> list[Group]:
        """Return a batch of whole groups; none when a load went wrong while it was drawn.

        With several batches in flight as many threads are in here.
        """
        failures_before = self._sync.failures_total
        try:
            groups = self._rollouts.next_batch()
        except (CorruptWeights, EngineUnreachable) as error:  # the sync loads the weights again
            log.warning("the batch was dropped: %s", error)
            self._stop.wait(self._settings.retry_s)
            return []
        self._status.drew(sum(group.num_response_tokens for group in groups))
        if self._sync.confirm(failures_before):
            return groups
        self._drop(groups, "a load failed the canary while they were drawn")
        return []

    def _deliver(self, groups: list[Group]) -> None:
        """Return once every group, spooled ones first, is answered or on disk; on shutdown the rest is dropped."""
        while True:
            pause_s = None
            if self._retry_at_s is None or self._now() >= self._retry_at_s:
                try:
                    groups, pause_s = self._submit_all(groups)
                except UNREACHABLE as error:
                    self._note_away(error)
                else:
                    self._retry_at_s = self._problem = None
                    self._away.reset()
                    if pause_s is None:
                        return
            if self._retry_at_s is not None:
                groups = groups[self._spool.append(groups) :]
                if not groups:
                    return
                pause_s = self._retry_at_s - self._now()
                self._status.enter(Activity.WAITING_SERVICE, self._spool.why_full)
            assert pause_s is not None
            if self._stop.wait(max(pause_s, 0.0)):
                self._drop(groups, "told to stop")
                return

    def _submit_all(self, groups: list[Group]) -> tuple[list[Group], float | None]:
        """Submit the spool, then the groups; return the groups that must be tried again, and after how many seconds."""
        while spooled := self._spool.oldest(self._settings.groups_per_batch):
            submission = self._inbox.submit(spooled)
            for result in submission.results:
                if result.outcome is InsertOutcome.FULL:
                    return groups, self._pause_s(submission, result)
                self._tally(result)
                self._spool.pop(refused=result.outcome in _REFUSED)
        if not groups:
            return [], None
        submission = self._inbox.submit(groups)
        again, pause_s = [], None
        for group, result in zip(groups, submission.results, strict=True):
            if result.outcome is InsertOutcome.FULL:
                again.append(group)
                pause_s = self._pause_s(submission, result)
            else:
                self._tally(result)
        return again, pause_s

    def _pause_s(self, submission: Submission, full: InsertResult) -> float:
        """Return the service's Retry-After, stretched by up to a half, so that many actors do not return at once."""
        self._status.enter(Activity.WAITING_ADMISSION, full.reason)
        retry_after_s = self._settings.retry_s if submission.retry_after_s is None else submission.retry_after_s
        return retry_after_s * self._jitter.uniform(1.0, 1.5)

    def _tally(self, result: InsertResult) -> None:
        self._status.groups_total += 1
        self._status.outcomes[result.outcome] += 1
        if result.outcome in _REFUSED:
            log.error(
                "group %s was refused as %s: %s",
                result.group_id,
                result.outcome,
                result.reason,
                extra={"group_id": result.group_id},
            )

    def _note_away(self, error: Exception) -> None:
        if self._problem is not type(error):
            log.warning("nothing can be delivered, groups go to the spool: %s", error)
        self._problem = type(error)
        self._retry_at_s = self._now() + self._away.next_pause_s()

    def _drop(self, groups: Sequence[Group], reason: str) -> None:
        if groups:
            self._status.dropped(len(groups))
            log.warning("dropped %d whole groups: %s", len(groups), reason)
