"""What the actor is doing, for its log, its heartbeats and the dashboard."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from buffer.errors import StalewiseError
from buffer.types import PolicyVersion
from buffer.wire import Heartbeat, Load

log = logging.getLogger(__name__)


class Activity(StrEnum):
    """What the main loop is at."""

    GENERATING = "generating"
    SPOOLING = "spooling"
    """Generating while the service is away."""
    EVALUATING = "evaluating"
    WAITING_ADMISSION = "waiting_admission"
    WAITING_SERVICE = "waiting_service"
    """The service is away and the spool is full, or the disk refuses to take more."""
    WAITING_WEIGHTS = "waiting_weights"
    QUARANTINED = "quarantined"
    FOLLOWING = "following"
    """Keeping a server at the newest version for agents that draw from it."""


_WORKING = frozenset({Activity.GENERATING, Activity.SPOOLING, Activity.EVALUATING, Activity.FOLLOWING})


class Status:
    """Counters and the current activity; the main loop writes, threads that draw count, the heartbeat thread reads."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._activity = Activity.WAITING_WEIGHTS
        self._reason = "no version yet"
        self._since_s = now()
        self._tokens_total = 0
        self._last_beat = (now(), 0)
        self.groups_total = 0
        """Groups that the service answered."""
        self.outcomes: Counter[str] = Counter()
        """Answers by outcome; `dropped` are groups that were never submitted."""

    def enter(self, activity: Activity, reason: str = "") -> None:
        """Say what the main loop does from now on; a change is logged."""
        with self._lock:
            if activity is not self._activity:
                log.info("%s%s", activity, f": {reason}" if reason else "")
                self._since_s = self._now()
            self._activity, self._reason = activity, reason

    def drew(self, num_tokens: int) -> None:
        """Count generated tokens."""
        with self._lock:
            self._tokens_total += num_tokens

    def dropped(self, num_groups: int) -> None:
        """Count groups that were never submitted."""
        with self._lock:
            self.outcomes["dropped"] += num_groups

    def waited_s(self) -> float:
        """Return for how long the main loop has been waiting; 0 while it works."""
        with self._lock:
            return 0.0 if self._activity in _WORKING else self._now() - self._since_s

    def heartbeat(
        self, version: PolicyVersion, loads: Sequence[Load] = (), *, unscored_groups_total: int = 0
    ) -> Heartbeat:
        """Return a heartbeat whose rate is over the time since the one before."""
        with self._lock:
            now_s, (then_s, then_tokens) = self._now(), self._last_beat
            self._last_beat = (now_s, self._tokens_total)
            waited = "" if self._activity in _WORKING else f" (for {now_s - self._since_s:.0f} s)"
            return Heartbeat(
                version=version,
                tokens_per_s=(self._tokens_total - then_tokens) / max(now_s - then_s, 1e-3),
                groups_total=self.groups_total,
                unscored_groups_total=unscored_groups_total,
                state=self._activity.value,
                detail=(self._reason + waited)[:1024],
                loads=tuple(loads),
            )


class Monitor(Protocol):
    """Where heartbeats go: buffer.client.ServiceClient."""

    def heartbeat(self, actor_id: str, heartbeat: Heartbeat) -> None:
        """Say that an actor is alive."""
        ...


class Pulse:
    """The thread that sends a heartbeat every `heartbeat_s` and warns of long waits."""

    def __init__(
        self,
        *,
        status: Status,
        version: Callable[[], PolicyVersion],
        loads: Callable[[], Sequence[Load]],
        unscored_groups_total: Callable[[], int],
        monitor: Monitor,
        actor_id: str,
        heartbeat_s: float,
        stall_s: float,
        stop: threading.Event,
    ) -> None:
        self._status = status
        self._version = version
        self._loads = loads
        self._unscored_groups_total = unscored_groups_total
        self._monitor = monitor
        self._actor_id = actor_id
        self._heartbeat_s = heartbeat_s
        self._stall_s = stall_s
        self._stop = stop
        self._heard = True
        self._warned_at_s = 0.0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread after `stop` was set."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self.beat()

    def beat(self) -> None:
        """Send one heartbeat. One that cannot be delivered is dropped, and the log says so once per outage."""
        heartbeat = self._status.heartbeat(
            self._version(), self._loads(), unscored_groups_total=self._unscored_groups_total()
        )
        self._warn_of_stall(heartbeat)
        try:
            self._monitor.heartbeat(self._actor_id, heartbeat)
        except StalewiseError as error:
            if self._heard:
                log.warning("heartbeats are not heard: %s", error)
            self._heard = False
        else:
            self._heard = True

    def _warn_of_stall(self, heartbeat: Heartbeat) -> None:
        waited_s = self._status.waited_s()
        if waited_s < self._warned_at_s:
            self._warned_at_s = 0.0
        if waited_s - self._warned_at_s >= self._stall_s:
            log.warning("%s: %s", heartbeat.state, heartbeat.detail)
            self._warned_at_s = waited_s
