"""The learner's loop: sample, step, publish, checkpoint; no tensor is touched here.

With several ranks the first one runs it, and announces to the others what they do with it (learner.following).

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a batch; the limiter's minimum | a step, then a version | actors inserting | finish the step, publish, checkpoint |
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from buffer.errors import InvalidSettings, ServiceUnreachable, StalewiseError, StoreUnavailable
from buffer.selectors import Weighted, rest_of
from buffer.table import Wait
from buffer.trained import TrainedGroup
from buffer.types import PolicyVersion
from learner.admission import Admission
from learner.checkpoint import Checkpoints
from learner.collate import collate
from learner.distributed import ALONE, Ranks
from learner.errors import TooManySkips
from learner.following import Order, begin_version
from learner.publisher import Publisher
from learner.sampling import Draw, Prefetcher
from learner.settings import LearnerSettings
from learner.step import SKIPPED, Progress, Trainer
from learner.trained import trained_groups

log = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a waiting learner looks whether it was told to stop."""
SILENT_WAIT_S = 1.0
"""Waits up to this long are the normal rhythm of a loop and are not reported."""


class Reporter(Protocol):
    """Who wants to know how the learner is doing. Must not block for long, nor raise when the service is away."""

    def update(self, progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        """Take the metrics of one update, and the groups that it trained on."""
        ...

    def waiting(self, progress: Progress, wait: Wait, counts: Mapping[str, float]) -> None:
        """Hear that the learner waits, and what it has counted; the next `update` ends the wait."""
        ...

    def skipped(self, progress: Progress, counts: Mapping[str, float]) -> None:
        """Hear that an update was skipped, and what the learner has counted."""
        ...


def take_up(
    trainer: Trainer, checkpoints: Checkpoints, publisher: Publisher, *, resume: bool, ranks: Ranks = ALONE
) -> None:
    """Bring the trainer to where its run goes on, with a clock above every published version.

    Raises InvalidSettings when the run was begun before and `resume` is not asked for. With several ranks all of them
    make this call, and the first one looks where that is.
    """
    found = (publisher.latest_version(), _text(checkpoints.newest())) if ranks.is_first else None
    latest, newest_text = cast("tuple[PolicyVersion | None, str | None]", ranks.from_first(found))
    newest = None if newest_text is None else Path(newest_text)
    if not resume:
        if latest is not None or newest is not None:
            raise InvalidSettings(
                f"this run was begun before: latest published version {latest}, newest checkpoint {newest}",
                hint="go on with --resume, or give the run another name",
            )
        return
    if newest is not None:
        checkpoints.restore(newest, trainer)
        log.info("resumed from %s", newest)
    elif latest is not None:
        log.warning("version %d is published but there is no checkpoint: starting from the initial weights", latest)
    if latest is not None and latest >= trainer.progress.clock:
        trainer.progress = replace(trainer.progress, clock=latest + 1)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class LearnerLoop:
    """Runs from the weights that the trainer has to `total_updates`, or until `stop` is set."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        prefetcher: Prefetcher,
        admission: Admission,
        publisher: Publisher,
        checkpoints: Checkpoints,
        reporter: Reporter,
        settings: LearnerSettings,
        stop: threading.Event,
        now: Callable[[], float],
        ranks: Ranks = ALONE,
    ) -> None:
        self._trainer = trainer
        self._prefetcher = prefetcher
        self._admission = admission
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._settings = settings
        self._stop = stop
        self._now = now
        self._ranks = ranks
        self._dropped: Counter[str] = Counter()
        self._mishaps: Counter[str] = Counter()
        self._skipped_in_a_row = 0
        self._published_clock = -1
        self._owed: PolicyVersion | None = None  # what waits for an earlier version that is on its way
        self._coalesced = 0
        self._warned_of_token_rewards = False
        self._saved_updates = -1 if checkpoints.newest() is None else trainer.progress.updates  # restored from it
        self._report_s = 0.0
        self._in_the_middle = False

    def run(self) -> None:
        """Publish the weights at hand, train, and leave with everything published and saved.

        Raises what sampling, an update or publishing raises. A checkpoint goes before the end where the weights are
        good: whatever drawing, reporting or sending met, and when too many updates were skipped. After an update, a
        snapshot or a checkpoint that failed, or when a rank is gone, nothing is published or saved.
        """
        _warn_of_priorities(self._settings)
        try:
            self._publish()
            self._train()
            self._flush()
            self._publish()
            self._flush()
        except Exception:
            if not self._in_the_middle:
                self._save()  # the weights are good: what came between must not cost the work since the last one
            raise
        self._save()
        self._announce(Order.END.value)

    def _train(self) -> None:
        if self._done():  # a finished run that is started again takes no groups
            log.info("all %d updates of learner.total_updates were made before", self._settings.total_updates)
            return
        with self._prefetcher:
            began_s = self._now()
            while not self._done() and (draw := self._next_batch(began_s)) is not None:
                self._update(draw, waited_s=self._now() - began_s)
                began_s = self._now()
        log.info("%s after %d updates", "done" if self._done() else "told to stop", self._trainer.progress.updates)

    def _done(self) -> bool:
        return self._trainer.progress.updates >= self._settings.total_updates

    def _next_batch(self, began_s: float) -> Draw | None:
        """Wait for a batch that may be trained on; None when told to stop.

        A batch of which groups were dropped is short: waiting for others would only age the rest.
        """
        next_report_s = SILENT_WAIT_S
        while not self._stop.is_set():
            self._announce(Order.WAIT.value)
            drawn = self._take()
            if drawn is not None and (admitted := self._admit(drawn)) is not None:
                return admitted
            self._publish_owed()
            waited_s = self._now() - began_s
            if waited_s >= next_report_s:
                self._report_wait(waited_s)
                next_report_s = (waited_s // self._settings.stall_s + 1) * self._settings.stall_s
        return None

    def _take(self) -> Draw | None:
        try:
            return self._prefetcher.take(timeout_s=POLL_S)
        except (ServiceUnreachable, StoreUnavailable):
            if self._stop.is_set():
                return None  # the stop ended the retries
            raise

    def _admit(self, drawn: Draw) -> Draw | None:
        """Return the groups that may be trained on, at their age of now; None when there are none."""
        clock = self._trainer.progress.clock
        admitted, refused, sentences = self._admission.split(drawn.samples, clock=clock)
        self._dropped.update({f"dropped/{refusal.value}_groups_total": count for refusal, count in refused.items()})
        for sentence in sentences:
            log.warning("%s", sentence)
        if not refused:
            return Draw(drawn.samples, drawn.batch.aged(clock - drawn.clock), clock)
        return Draw(admitted, collate(admitted, clock=clock), clock) if admitted else None

    def _report_wait(self, waited_s: float) -> None:
        reason = (
            f"the learner waits for a batch of {self._settings.groups_per_update} groups: {self._prefetcher.reason}"
        )
        stalled = waited_s >= self._settings.stall_s
        self._mishaps["stall/warnings_total"] += stalled
        log.log(logging.WARNING if stalled else logging.INFO, "%s (for %.0f s)", reason, waited_s)
        wait = Wait(who="learner", since_s=waited_s, reason=reason)
        self._reporter.waiting(self._trainer.progress, wait, self._counts())

    def _update(self, draw: Draw, *, waited_s: float) -> None:
        self._warn_of_token_rewards(draw)
        self._announce(draw.batch)
        try:
            with self._indivisible():
                metrics = self._trainer.update(draw.batch)
        except tuple(SKIPPED) as error:
            self._skip(error)
            return
        self._skipped_in_a_row = 0
        stepped_s = self._now()
        if self._trainer.progress.updates % self._settings.publish_every == 0:
            self._publish()
        published_s = self._now()
        if self._trainer.progress.updates % self._settings.checkpoint_every == 0:
            self._save()
        times = {
            "time/sample_wait_s": waited_s,
            "time/publish_s": published_s - stepped_s,
            "time/checkpoint_s": self._now() - published_s,
            "time/report_s": self._report_s,
            "publish/coalesced_versions_total": float(self._coalesced),
            "dropped/lost_draws_total": float(self._prefetcher.lost_draws),
        }
        if (sent := self._publisher.sent) is not None:
            times |= {"publish/payload_bytes": float(sent.payload_bytes), "publish/background_s": sent.seconds}
        reporting_s = self._now()
        trained = trained_groups(
            draw.samples, self._trainer.log_ratios, clock=draw.clock, max_tokens=self._settings.report_tokens
        )
        self._reporter.update(self._trainer.progress, {**metrics, **self._counts(), **times}, trained)
        self._report_s = self._now() - reporting_s

    def _warn_of_token_rewards(self, draw: Draw) -> None:
        """Say once that rewards teach nothing."""
        objective = self._trainer.objective
        if draw.batch.token_rewards is None or objective.reads_token_rewards or self._warned_of_token_rewards:
            return
        self._warned_of_token_rewards = True
        log.warning(
            "the data has token_rewards, which objective %s does not read: it learns from the reward of a trajectory "
            "alone (a recipe's advantage = optimal_token_baseline reads both)",
            objective.name,
        )

    def _skip(self, error: StalewiseError) -> None:
        """Count an update that moved nothing; its batch is spent. Raises TooManySkips."""
        self._mishaps[f"skipped/{SKIPPED[type(error)]}_updates_total"] += 1
        self._skipped_in_a_row += 1
        log.warning("update %d is skipped: %s", self._trainer.progress.updates, error)
        self._reporter.skipped(self._trainer.progress, self._counts())
        if self._skipped_in_a_row >= self._settings.max_skipped_updates:
            raise TooManySkips(
                f"{self._skipped_in_a_row} updates in a row were skipped, the last one because {error.detail}",
                hint=error.hint or "resume with a lower learner.optimizer.lr",
            ) from error

    def _counts(self) -> dict[str, float]:
        return {**self._dropped, **self._mishaps}

    def _publish(self) -> None:
        """Begin to publish the weights at hand, or as soon as no earlier version is on its way, in place of others."""
        clock = self._trainer.progress.clock
        if clock != self._published_clock:
            self._coalesced += self._owed not in (None, clock)
            self._owed = clock
            self._publish_owed()

    def _publish_owed(self) -> None:
        """Begin to publish the weights at hand in place of a version that waits, if there is one whose turn it is."""
        if self._owed is None or not self._publisher.idle:
            return
        self._publisher.flush()  # raises what became of the version before, while no rank has begun another
        self._announce(Order.PUBLISH.value)
        with self._indivisible():
            begin_version(self._trainer, self._publisher, self._settings, ranks=self._ranks)
        clock = self._trainer.progress.clock
        self._coalesced += self._owed != clock
        self._owed, self._published_clock = None, clock

    def _flush(self) -> None:
        """Wait until nothing is on its way. Raises what became of it."""
        while not self._publisher.settled(POLL_S):
            self._announce(Order.WAIT.value)
        self._publisher.flush()

    def _save(self) -> None:
        updates = self._trainer.progress.updates
        if updates != self._saved_updates:
            self._announce(Order.SAVE.value)
            with self._indivisible():
                log.info("checkpoint %s", self._checkpoints.save(self._trainer))
            self._saved_updates = updates

    def _announce(self, what: object) -> None:
        """Tell the other ranks what is next. Raises what torch does when one of them is gone."""
        with self._indivisible():
            self._ranks.from_first(what)

    @contextmanager
    def _indivisible(self) -> Iterator[None]:
        """Note that an error in this block leaves nothing to save: half an update, or ranks in mid-step or gone.

        One of SKIPPED leaves everything as before.
        """
        self._in_the_middle = True
        try:
            yield
        except tuple(SKIPPED):
            self._in_the_middle = False
            raise
        self._in_the_middle = False


def _warn_of_priorities(settings: LearnerSettings) -> None:
    selectors = [settings.selector, *([settings.replay_selector] if settings.replay_updates else [])]
    if Weighted(by="priority") in map(rest_of, selectors):
        log.warning(
            "groups are drawn by priorities, which this learner does not post: until somebody does (POST "
            "/v1/priorities) all of them are drawn alike"
        )
