"""The replay table in the memory of one process: for tests, for trying things out, and as the meaning of RedisTable."""

import heapq
import random
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from buffer.codec import encode_group, record_hash
from buffer.errors import Conflict, InvalidRequest, NotFound
from buffer.outcomes import Facts, no_fit, refusal, refused_at_sight
from buffer.rate_limiter import (
    Pace,
    RateLimiterSettings,
    check_request,
    check_settings,
    draw_blocked,
    insert_ceiling,
    limiter_error,
    may_insert,
    reuse_mean,
)
from buffer.selectors import Fifo, Fresh, Mix, Selector, Uniform, draw_lots, draw_ranks, num_fresh
from buffer.staleness import age_updates, is_too_old
from buffer.table import SampleRequest, TableSettings, TableStats
from buffer.types import Group, InsertOutcome, InsertResult, PolicyVersion, Sample, SampleInfo, Split
from buffer.waits import Waiting, refused_again, report


@dataclass(slots=True)
class _Entry:
    sequence: int
    group: Group
    content: str
    size_bytes: int
    inserted_s: float
    uses: int = 0

    @property
    def is_train(self) -> bool:
        return self.group.split is Split.TRAIN


@dataclass(frozen=True, slots=True)
class _Draw:
    """A draw that was handed out, kept for a repeat of its request_id."""

    request: SampleRequest
    drawn_s: float
    samples: list[Sample]


class MemoryTable:
    """A ReplayTable whose state is this object; every method holds one lock."""

    def __init__(
        self,
        settings: TableSettings,
        limiter: RateLimiterSettings,
        run_id: str,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        check_settings(settings, limiter)
        self._settings, self._limiter, self._run_id = settings, limiter, run_id
        self._clock, self._rng = clock, rng or random.Random()
        self._lock = threading.Lock()
        self._latest_version: PolicyVersion = -1
        self._next_sequence = 0
        self._entries: dict[int, _Entry] = {}  # by sequence number, in the order of insertion
        self._sequences: dict[str, int] = {}  # of stored groups, by group_id
        self._train: list[int] = []  # ascending
        self._fresh: dict[int, None] = {}  # an ordered set
        self._evictable: list[int] = []  # a heap; removed groups stay in it until they are popped
        self._by_version: dict[PolicyVersion, set[int]] = {}
        self._remembered: dict[str, tuple[str, float]] = {}  # group_id -> content hash, removed at; oldest first
        self._draws: dict[str, _Draw] = {}
        self._learner_wait: Waiting | None = None
        self._actors_wait: Waiting | None = None
        self._wanted_fresh = 0
        self._no_room = False
        self._bytes = self._evictable_bytes = self._num_evictable = self._num_foreign = self._num_tokens = 0
        self._inserted = self._sampled = self._num_trajectories = self._forgotten = 0
        self._reward_sum = 0.0
        self._outcomes: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._uses: Counter[int] = Counter()  # times handed out -> stored groups
        self._versions: Counter[PolicyVersion] = Counter()  # oldest version -> stored groups of our own

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not; see ReplayTable."""
        with self._lock:
            return [self._insert(group) for group in groups]

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out a draw, or [] while it must wait; see ReplayTable. Raises Conflict for a reused request_id."""
        check_request(request, self._limiter)
        lots = draw_lots(request.selector, request.num_groups, self._rng)
        with self._lock:
            now_s = self._clock()
            repeated = self._repeated(request, now_s)
            if repeated is not None:
                return repeated
            self._remove_overdue(now_s, max(request.learner_version, self._latest_version))
            wanted_fresh = num_fresh(request.selector, request.num_groups)
            blocked = draw_blocked(self._limiter, self._pace(), request.num_groups, wanted_fresh)
            if blocked == "no_fit":
                raise InvalidRequest(no_fit(request.num_groups, wanted_fresh, len(self._train), len(self._fresh)))
            if blocked:
                self._learner_wait = refused_again(self._learner_wait, blocked, now_s)
                self._wanted_fresh = wanted_fresh if blocked == "fresh" else self._wanted_fresh
                return []
            return self._draw(request, lots, now_s)

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; see ReplayTable."""
        with self._lock:
            self._latest_version = max(version, self._latest_version)
            self._remove_overdue(self._clock(), self._latest_version)

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        with self._lock:
            if group_id not in self._sequences:
                raise NotFound(f"group {group_id!r} is not stored", hint="it may have been removed since")
            return self._entries[self._sequences[group_id]].group

    def stats(self) -> TableStats:
        """Return the counters."""
        with self._lock:
            pace = self._pace()
            return TableStats(
                num_groups=len(self._train),
                num_fresh=len(self._fresh),
                num_eval=len(self._entries) - len(self._train),
                num_foreign=self._num_foreign,
                bytes=self._bytes,
                num_response_tokens=self._num_tokens,
                inserted_total=self._inserted,
                sampled_total=self._sampled,
                reuse_mean=reuse_mean(pace),
                outcomes=dict(self._outcomes),
                removed=dict(self._removed),
                stored_versions=dict(+self._versions),
                stored_uses=dict(+self._uses),
                reward_sum=self._reward_sum,
                num_trajectories_total=self._num_trajectories,
                forgotten_ids_total=self._forgotten,
                latest_version=self._latest_version,
                limiter_error=limiter_error(self._limiter, pace),
                waits=report(
                    self._learner_wait, self._actors_wait, limiter=self._limiter, pace=pace, now_s=self._clock()
                ),
            )

    def _pace(self) -> Pace:
        unused = self._removed["age_unsampled"] + self._removed["ttl_unsampled"]
        return Pace(
            sampleable=len(self._train),
            fresh=len(self._fresh),
            inserted=self._inserted - unused,
            sampled=self._sampled,
            wanted_fresh=self._wanted_fresh,
            no_room=self._no_room,
        )

    # --- insert

    def _insert(self, group: Group) -> InsertResult:
        now_s = self._clock()
        record = encode_group(group)
        content = record_hash(record)
        refused = refused_at_sight(group, len(record), self._settings, self._run_id)
        if refused is None:
            self._remove_overdue(now_s, self._latest_version)
            self._forget(now_s)
            refused = self._refused(group, content, len(record))
        if refused is None:
            self._store(group, content, len(record), now_s)
            outcome, reason = InsertOutcome.ACCEPTED, ""
        else:
            code, facts = refused
            outcome, reason = refusal(code, facts)
            if code in ("pace", "capacity"):
                self._actors_wait = refused_again(self._actors_wait, code, now_s)
            self._no_room = self._no_room or code == "capacity"
        self._outcomes[outcome.value] += 1
        return InsertResult(group_id=group.group_id, outcome=outcome, reason=reason)

    def _refused(self, group: Group, content: str, size_bytes: int) -> tuple[str, Facts] | None:
        """Return the code of a refusal with its facts; None when there is room, which is made here."""
        if (known := self._known_content(group.group_id)) is not None:
            return ("stored" if known == content else "conflict"), ()
        if (newest := group.newest_version) is not None and newest > self._latest_version:
            return "version", (newest, self._latest_version)
        if group.split is Split.TRAIN and (refused := self._refused_for_training(group)):
            return refused
        if not self._make_room(size_bytes):
            return "capacity", (len(self._entries), self._bytes)
        return None

    def _refused_for_training(self, group: Group) -> tuple[str, Facts] | None:
        settings, oldest, latest = self._settings, group.oldest_version, self._latest_version
        if oldest is not None and is_too_old(latest, oldest, settings.max_age_updates):
            return "stale", (oldest, latest - oldest, settings.max_age_updates or 0)
        if group.is_foreign:
            if settings.foreign_share == 0:
                return "foreign", ()
            if self._num_foreign + 1 > settings.foreign_share * (len(self._train) + 1):
                return "foreign_share", (self._num_foreign, len(self._train), settings.foreign_share)
        pace = self._pace()
        if not may_insert(self._limiter, pace):
            return "pace", (limiter_error(self._limiter, pace), insert_ceiling(self._limiter))
        return None

    def _known_content(self, group_id: str) -> str | None:
        if group_id in self._sequences:
            return self._entries[self._sequences[group_id]].content
        return self._remembered[group_id][0] if group_id in self._remembered else None

    def _make_room(self, size_bytes: int) -> bool:
        """Evict what may be evicted until one more group fits; evict nothing when it would not help."""
        settings = self._settings
        kept_groups, kept_bytes = len(self._entries) - self._num_evictable, self._bytes - self._evictable_bytes
        if kept_groups >= settings.capacity_groups or kept_bytes + size_bytes > settings.capacity_bytes:
            return False
        while len(self._entries) >= settings.capacity_groups or self._bytes + size_bytes > settings.capacity_bytes:
            entry = self._entries.get(heapq.heappop(self._evictable))
            if entry is not None:
                self._remove(entry, "capacity")
        return True

    def _store(self, group: Group, content: str, size_bytes: int, now_s: float) -> None:
        entry = _Entry(self._next_sequence, group, content, size_bytes, now_s)
        self._next_sequence += 1
        self._entries[entry.sequence] = entry
        self._sequences[group.group_id] = entry.sequence
        self._bytes += size_bytes
        self._actors_wait = None
        self._no_room = False
        if not entry.is_train:
            self._make_evictable(entry)
            return
        self._train.append(entry.sequence)
        self._fresh[entry.sequence] = None
        if (oldest := group.oldest_version) is not None:
            self._by_version.setdefault(oldest, set()).add(entry.sequence)
        self._count(entry, +1)
        self._inserted += 1
        self._num_trajectories += len(group.trajectories)
        self._reward_sum += sum(trajectory.reward for trajectory in group.trajectories)

    def _count(self, entry: _Entry, change: int) -> None:
        """Enter a train group into the counters of what is stored, or take it out."""
        group = entry.group
        self._num_tokens += change * group.num_response_tokens
        self._uses[entry.uses] += change
        if group.is_foreign:
            self._num_foreign += change
        elif group.oldest_version is not None:
            self._versions[group.oldest_version] += change

    def _make_evictable(self, entry: _Entry) -> None:
        heapq.heappush(self._evictable, entry.sequence)
        self._num_evictable += 1
        self._evictable_bytes += entry.size_bytes

    # --- sample

    def _repeated(self, request: SampleRequest, now_s: float) -> list[Sample] | None:
        window_s = self._settings.repeat_window_s
        self._draws = {key: draw for key, draw in self._draws.items() if now_s - draw.drawn_s < window_s}
        draw = self._draws.get(request.request_id)
        if draw is None:
            return None
        if draw.request != request:
            raise Conflict(f"request_id {request.request_id!r} was used for another draw", hint="use a new request_id")
        return draw.samples

    def _draw(self, request: SampleRequest, lots: list[float], now_s: float) -> list[Sample]:
        clock = max(request.learner_version, self._latest_version)
        chosen = self._choose(request.selector, request.num_groups, lots)
        samples = [self._hand_out(self._entries[sequence], chance, clock) for sequence, chance in chosen]
        self._sampled += len(samples)
        self._learner_wait = None
        self._wanted_fresh, self._no_room = 0, False
        self._draws[request.request_id] = _Draw(request, now_s, samples)
        return samples

    def _choose(self, selector: Selector, num_groups: int, lots: list[float]) -> list[tuple[int, float]]:
        """Return (sequence number, probability) of each chosen group."""
        match selector:
            case Fifo():
                return [(sequence, 1.0) for sequence in self._train[:num_groups]]
            case Uniform():
                return self._choose_uniform([], lots)
            case Fresh():
                return [(sequence, 1.0) for sequence in list(self._fresh)[:num_groups]]
            case Mix(rest=rest):
                fresh = list(self._fresh)[: num_fresh(selector, num_groups)]
                if isinstance(rest, Uniform):
                    others = self._choose_uniform(fresh, lots)
                else:
                    others = [(sequence, 1.0) for sequence in self._train[:num_groups] if sequence not in fresh]
                return [(sequence, 1.0) for sequence in fresh] + others[: num_groups - len(fresh)]

    def _choose_uniform(self, taken: list[int], lots: list[float]) -> list[tuple[int, float]]:
        ranks = [bisect_left(self._train, sequence) for sequence in taken]
        chance = 1 / max(1, len(self._train) - len(taken))
        return [(self._train[rank], chance) for rank in draw_ranks(ranks, len(self._train), lots)]

    def _hand_out(self, entry: _Entry, chance: float, clock: PolicyVersion) -> Sample:
        self._uses[entry.uses] -= 1
        entry.uses += 1
        self._uses[entry.uses] += 1
        if entry.uses == 1:
            del self._fresh[entry.sequence]
            self._make_evictable(entry)
        info = SampleInfo(
            probability=chance, times_sampled=entry.uses, age_updates=age_updates(clock, entry.group.oldest_version)
        )
        if self._settings.reuse_limit is not None and entry.uses >= self._settings.reuse_limit:
            self._remove(entry, "reuse")
        return Sample(group=entry.group, info=info)

    # --- removal

    def _remove_overdue(self, now_s: float, clock: PolicyVersion) -> None:
        """Remove what the TTL and the age gate close."""
        if self._settings.ttl_s is not None:
            overdue = [e for e in self._entries.values() if e.inserted_s <= now_s - self._settings.ttl_s]
            for entry in overdue:
                self._remove(entry, "ttl_unsampled" if entry.is_train and not entry.uses else "ttl")
        for version in [v for v in self._by_version if is_too_old(clock, v, self._settings.max_age_updates)]:
            for sequence in sorted(self._by_version[version]):
                entry = self._entries[sequence]
                self._remove(entry, "age" if entry.uses else "age_unsampled")

    def _remove(self, entry: _Entry, reason: str) -> None:
        group = entry.group
        del self._entries[entry.sequence], self._sequences[group.group_id]
        self._bytes -= entry.size_bytes
        self._removed[reason] += 1
        if entry.uses or not entry.is_train:
            self._num_evictable -= 1
            self._evictable_bytes -= entry.size_bytes
        if entry.is_train:
            del self._train[bisect_left(self._train, entry.sequence)]
            self._fresh.pop(entry.sequence, None)
            self._count(entry, -1)
            if (oldest := group.oldest_version) is not None:
                self._by_version[oldest].discard(entry.sequence)
                if not self._by_version[oldest]:
                    del self._by_version[oldest]
        self._remembered.pop(group.group_id, None)
        self._remembered[group.group_id] = (entry.content, self._clock())
        if len(self._remembered) > self._settings.dedup_max_ids:
            del self._remembered[next(iter(self._remembered))]
            self._forgotten += 1

    def _forget(self, now_s: float) -> None:
        overdue_s = now_s - self._settings.dedup_window_s
        for group_id in list(self._remembered):
            if self._remembered[group_id][1] > overdue_s:
                return
            del self._remembered[group_id]
