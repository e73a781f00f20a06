"""Weight sync: the thread that brings new versions into the engine and proves each one by the canary.

| waits for | produces | unblocked by | on shutdown |
|---|---|---|---|
| a newer manifest (long poll) | an engine that passed the canary | the learner publishing | stop polling |

Download and decoding happen before the engine is asked: what it waits for is the copy alone. A load that fails the
canary puts the actor into quarantine: the latest version is fetched again from a keyframe, and until a load passes
nothing is submitted, what was drawn meanwhile included (`confirm`).
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np

from actor.backoff import Backoff
from actor.engine import Engine
from actor.receiver import Receiver
from actor.settings import ActorSettings
from buffer.errors import (
    CanaryFailed,
    CorruptWeights,
    EngineUnreachable,
    NotFound,
    RunMismatch,
    ServiceUnreachable,
    StoreUnavailable,
)
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Probe
from buffer.weights.store import WeightStore
from buffer.wire import Load

log = logging.getLogger(__name__)

UNREACHABLE = (ServiceUnreachable, StoreUnavailable, httpx.TransportError)
"""The service is away or its store refuses: worth trying again."""

_KEPT_LOADS = 8


class WeightSync:
    """Owns the thread. `wait_ready` and `confirm` are for the main loop."""

    def __init__(
        self,
        *,
        store: WeightStore,
        engine: Engine,
        run_id: str,
        model_fingerprint: str,
        receiver: Receiver,
        settings: ActorSettings,
        stop: threading.Event,
        jitter: random.Random,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._engine = engine
        self._run_id = run_id
        self._model_fingerprint = model_fingerprint
        self._receiver = receiver
        self._poll_s = settings.poll_s
        self._backoff = Backoff(settings.retry_s, jitter)
        self._stop = stop
        self._unix_time = unix_time
        self._thread = threading.Thread(target=self._run, name="weight-sync", daemon=True)
        self._loading = threading.Lock()  # held from the first changed weight to the canary's verdict
        self._ready = threading.Event()
        self._fatal: Exception | None = None
        self.verified_version: PolicyVersion = -1
        """The newest version that passed the canary."""
        self.loads: deque[Load] = deque(maxlen=_KEPT_LOADS)
        """The newest versions that passed the canary, oldest first."""
        self.failures_total = 0
        """Loads that were refused by the canary or by the engine."""
        self.quarantine_reason = ""
        """Why nothing may be submitted; empty when all is well."""

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread after `stop` was set; a long poll may outlive the wait, and dies with the process."""
        self._thread.join(timeout_s)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for weights that passed the canary. Raises what ended the thread, such as RunMismatch."""
        ready = self._ready.wait(timeout_s)
        if self._fatal is not None:
            raise self._fatal
        return ready

    def confirm(self, failures_before: int) -> bool:
        """Whether every load since `failures_total` was `failures_before` passed; waits for one that is under way."""
        with self._loading:
            return self.failures_total == failures_before and not self.quarantine_reason

    @contextmanager
    def held(self) -> Iterator[PolicyVersion]:
        """Let no load begin within this block; yield the version in use, -1 when it has not passed the canary."""
        with self._loading:
            yield -1 if self.quarantine_reason else self.verified_version

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._stop.wait(self._poll())
        except Exception as error:  # noqa: BLE001 the main loop would wait for ever for a thread that died in silence
            self._fatal = error
            self._ready.set()

    def _poll(self) -> float:
        """Take the next version, if one appears; return the seconds to pause."""
        try:
            # an engine on a server that was started again has lost the version that it proved
            held = min(self.verified_version, self._engine.version)
            manifest = self._store.latest(after=held, wait_s=self._poll_s)
            if manifest is not None:
                self._take(manifest)
        except (*UNREACHABLE, EngineUnreachable, NotFound, CorruptWeights, CanaryFailed) as error:
            pause_s = self._backoff.next_pause_s()
            log.warning("no new weights yet, next attempt in %.1f s: %s", pause_s, error)
            return pause_s
        self._backoff.reset()
        return 0.0

    def _take(self, manifest: Manifest) -> None:
        """Fetch, load and prove one version."""
        if manifest.run_id != self._run_id or manifest.model_fingerprint != self._model_fingerprint:
            raise RunMismatch(
                f"version {manifest.version} is of run {manifest.run_id} and model {manifest.model_fingerprint[:12]},"
                f" this actor of run {self._run_id} and model {self._model_fingerprint[:12]}",
                hint="start the actor with the model directory of the learner, and against its service",
            )
        self._receiver.fetch(manifest)
        with self._loading:
            self._load(manifest)

    def _load(self, manifest: Manifest) -> None:
        try:
            self._receiver.load(manifest)
            check_canary(self._engine, manifest.probe, version=manifest.version)
        except (CorruptWeights, CanaryFailed) as error:
            self._receiver.discard()
            self.failures_total += 1
            self.quarantine_reason = f"{error}; {self.failures_total} failed loads so far"
            self._ready.clear()
            raise
        if self.quarantine_reason:
            log.warning("version %d passed the canary: out of quarantine", manifest.version)
        self.quarantine_reason = ""
        self.verified_version = manifest.version
        loaded_s = max(0.0, self._unix_time() - manifest.created_s)  # another machine's clock may be ahead
        self.loads.append(Load(version=manifest.version, publish_to_loaded_s=loaded_s))
        self._ready.set()
        log.info(
            "generating with version %d, %.3f s after the learner had it",
            manifest.version,
            loaded_s,
            extra={"version": manifest.version},
        )


def check_canary(engine: Engine, probe: Probe, *, version: PolicyVersion) -> None:
    """Raise CanaryFailed unless the engine gives the probe the log-probs that the learner computed."""
    scores = engine.score(probe.token_ids)
    worst_nats = float(np.abs(scores - probe.logprobs).max())
    if not worst_nats <= probe.tolerance:  # NaN fails too
        raise CanaryFailed(
            f"version {version} was loaded wrongly: the canary is off by {worst_nats:.3g} nats, {probe.tolerance:g} is"
            " tolerated",
            hint="the keyframe is fetched again; until a load passes, this actor submits nothing",
        )
