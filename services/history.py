"""What the dashboard's charts show: a bounded history of the run's numbers, the same for every API worker.

A point holds counters (their last value) and gauges (their mean over the point's time). When there are too many points,
neighbours are joined and a point covers twice the time: the history always reaches back to the start of the run.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Protocol

from pydantic import FiniteFloat

from buffer.errors import StoreUnavailable
from buffer.redis_client import RedisClient, store_errors
from buffer.types import Record
from buffer.wire import ServiceStats

log = logging.getLogger(__name__)

CAPACITY = 480
"""Points at most: a screen is not much wider, and a page of 60 series loads 200 kB."""

TICK_S = 2.0
"""Seconds between two observations, and what a point covers at first."""

_NEWEST = 16
"""Points that are looked at first: a page that is up to date asks for one or two."""

_SILENT_S = 120.0
"""A learner that was silent for so long is not repeated: its lines end."""

_METRICS = (
    "reward/mean",
    "age/updates_p50",
    "age/updates_p90",
    "loss/total",
    "gradient/norm",
    "effective_samples/",
    "ratio/p",
    "ratio/max",
    "k1/nats_mean",
    "k3/",
    "trust_region/bound_",
    "time/",
)
"""Beginnings of the learner's metrics that are remembered; of gates, what they kept."""
_KEPT = "_sequences_kept_share"


class Point(Record):
    """The numbers of a stretch of time."""

    at_s: FiniteFloat
    """Unix time at which it began."""
    counters: dict[str, float]
    gauges: dict[str, float]


class HistoryPage(Record):
    """The answer of GET /v1/history."""

    step_s: FiniteFloat
    """Seconds that a point covers; when it has doubled, all points are new."""
    points: list[Point]
    """Oldest first; the last one still moves."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The numbers of a moment."""

    counters: Mapping[str, float]
    gauges: Mapping[str, float]


class History(Protocol):
    """Where observations go. Any number of workers may observe: one of them in each TICK_S counts."""

    def remember(self, observation: Observation) -> None:
        """Add an observation, unless another one has just been added."""
        ...

    def read(self, *, after_s: float) -> HistoryPage:
        """Return the points that began at `after_s` or later."""
        ...


@dataclass
class MemoryHistory:
    """A History of one process."""

    clock: Callable[[], float] = time.time
    capacity: int = CAPACITY
    _points: list[dict[str, Any]] = field(default_factory=list)
    _step_s: float = TICK_S
    _seen_s: float | None = None

    def remember(self, observation: Observation) -> None:
        """See History."""
        now_s = self.clock()
        if self._seen_s is not None and abs(now_s - self._seen_s) < TICK_S / 2:
            return
        self._seen_s = now_s
        point = _as_point(observation, now_s)
        if self._points and 0 <= now_s - self._points[-1]["t"] < self._step_s:
            self._points[-1] = _merged(self._points[-1], point)
        else:
            self._points.append(point)
        if len(self._points) > self.capacity:
            pairs = zip(self._points[::2], [*self._points[1::2], None], strict=False)
            self._points = [_merged(first, second) if second else first for first, second in pairs]
            self._step_s *= 2

    def read(self, *, after_s: float) -> HistoryPage:
        """See History."""
        points = [_means(point) for point in self._points if point["t"] >= after_s]
        return HistoryPage(step_s=self._step_s, points=points)


class RedisHistory:
    """A History in Redis; the header of lua/remember.lua is the schema of the keys below `prefix`."""

    def __init__(
        self,
        client: RedisClient,
        *,
        prefix: str,
        clock: Callable[[], float] = time.time,
        capacity: int = CAPACITY,
    ) -> None:
        self._redis = client
        self._points, self._pace = f"{prefix}points", f"{prefix}pace"
        self._clock = clock
        self._capacity = capacity
        self._remember = client.register_script((files("services") / "lua" / "remember.lua").read_text())

    def remember(self, observation: Observation) -> None:
        """See History. Raises StoreUnavailable."""
        now_s = self._clock()
        point = json.dumps(_as_point(observation, now_s))
        with store_errors():
            self._remember(keys=[self._points, self._pace], args=[now_s, TICK_S, self._capacity, point])

    def read(self, *, after_s: float) -> HistoryPage:
        """See History. Raises StoreUnavailable."""
        points = self._newest(_NEWEST)
        if len(points) == _NEWEST and points[0]["t"] > after_s:
            points = self._newest(self._capacity + 1)
        with store_errors():
            step_s: Any = self._redis.hget(self._pace, "step_s")
        points = [point for point in points if point["t"] >= after_s]
        return HistoryPage(step_s=float(step_s or TICK_S), points=[_means(point) for point in points])

    def _newest(self, number: int) -> list[dict[str, Any]]:
        with store_errors():
            found: Any = self._redis.lrange(self._points, -number, -1)
        return [json.loads(point) for point in found]


async def keep_history(history: History, observed: Callable[[], Observation]) -> None:
    """Remember what is observed every TICK_S until cancelled. The service calls it; nothing waits for it."""
    while True:
        await asyncio.sleep(TICK_S)
        try:
            await asyncio.to_thread(lambda: history.remember(observed()))
        except StoreUnavailable as error:
            log.warning("the history skips an observation: %s", error)
        except Exception:  # a defect of ours: the charts would stand still, and nobody would know why
            log.exception("the history could not be written")


def observe(stats: ServiceStats) -> Observation:
    """Return what of the statistics is remembered."""
    table, learner = stats.table, stats.learner
    waiting = {wait.who for wait in table.waits}
    counters: dict[str, float] = {
        "inserted": table.inserted_total,
        "sampled": table.sampled_total,
        "trajectories": table.num_trajectories_total,
        "reward_sum": table.reward_sum,
        "version": table.latest_version,
        **{f"outcome/{name}": count for name, count in table.outcomes.items()},
        **{f"removed/{name}": count for name, count in table.removed.items()},
    }
    gauges: dict[str, float] = {
        "groups": table.num_groups,
        "fresh": table.num_fresh,
        "bytes": table.bytes,
        "reuse_mean": table.reuse_mean,
        "actors": len(stats.actors),
        "tokens_per_s": sum(actor.tokens_per_s for actor in stats.actors),
        "learner_waits": float("learner" in waiting),
        "actors_wait": float("actors" in waiting),
        "memory_bytes": stats.store.memory_bytes,
    }
    loads = [load.publish_to_loaded_s for actor in stats.actors for load in actor.loads[-1:]]
    if loads:
        gauges["publish_to_loaded_s"] = sum(loads) / len(loads)
    for evaluation in stats.evaluations.results[-1:]:
        gauges |= {f"pass_at/{k}": share for k, share in evaluation.pass_at.items()}
    if learner is not None:
        counters["updates"] = learner.updates
    if learner is not None and learner.age_s < _SILENT_S:
        gauges |= {name: value for name, value in learner.metrics.items() if _is_remembered(name)}
    return Observation(counters=counters, gauges=gauges)


def _is_remembered(name: str) -> bool:
    return name.startswith(_METRICS) or name.endswith(_KEPT)


def _as_point(observation: Observation, now_s: float) -> dict[str, Any]:
    gauges = {name: [value, 1] for name, value in observation.gauges.items()}
    return {"t": now_s, "c": dict(observation.counters), "g": gauges}


def _merged(point: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    gauges = dict(point["g"])
    for name, (total, count) in later["g"].items():
        known_total, known_count = gauges.get(name, (0, 0))
        gauges[name] = [known_total + total, known_count + count]
    return {"t": point["t"], "c": point["c"] | later["c"], "g": gauges}


def _means(point: dict[str, Any]) -> Point:
    gauges = {name: total / count for name, (total, count) in point["g"].items()}
    return Point(at_s=point["t"], counters=point["c"], gauges=gauges)
