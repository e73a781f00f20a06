"""The replay table in the memory of one process: for tests, for trying things out, and as the meaning of RedisTable."""

import heapq
import random
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.codec import encode_group, encode_trajectory, record_hash
from buffer.errors import InvalidRequest, NotFound
from buffer.memory_entry import Entry, page_of
from buffer.outcomes import Facts, no_fit, outcome_of, refusal, refused_at_sight, refused_for_version
from buffer.parts import PartialGroups, judge_late, part_result
from buffer.prompts import MemoryPrompts, PromptPage, check_page, counts_of
from buffer.rate_limiter import (
    Pace,
    RateLimiterSettings,
    check_request,
    check_settings,
    draw_blocked,
    fresh_needed,
    insert_ceiling,
    limiter_error,
    may_insert,
)
from buffer.remembered import RememberedDraws, RememberedIds
from buffer.selectors import (
    Fifo,
    Fresh,
    Lifo,
    Selector,
    Uniform,
    Weighted,
    check_weighting,
    draw_lots,
    draw_ranks,
    num_fresh,
    rest_of,
)
from buffer.staleness import age_updates, is_too_old
from buffer.table import PriorityUpdate, SampleRequest, TableSettings, TableStats
from buffer.types import Group, InsertOutcome, InsertResult, Part, PartResult, PolicyVersion, Sample, SampleInfo, Split
from buffer.waits import Waiting, refused_again, report
from buffer.weighted_index import WeightedIndex
from buffer.weighting import checked_priorities


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
        self._entries: dict[int, Entry] = {}  # by sequence number, in the order of insertion
        self._sequences: dict[str, int] = {}  # of stored groups, by group_id
        self._train: list[int] = []  # ascending
        self._fresh: dict[int, None] = {}  # an ordered set
        self._evictable: list[int] = []  # a heap; removed groups stay in it until they are popped
        self._prompts = MemoryPrompts(settings.max_prompts)
        self._weighted = WeightedIndex(settings.weighting) if settings.weighting is not None else None
        self._by_version: dict[PolicyVersion, set[int]] = {}
        self._remembered = RememberedIds(settings)
        self._partials = PartialGroups(settings)
        self._draws = RememberedDraws(settings)
        self._learner_wait: Waiting | None = None
        self._actors_wait: Waiting | None = None
        self._wanted_fresh = 0
        self._no_room = False
        self._bytes = self._evictable_bytes = self._num_evictable = self._num_foreign = self._num_tokens = 0
        self._inserted = self._sampled = self._num_trajectories = 0
        self._reward_sum = 0.0
        self._outcomes: Counter[str] = Counter()
        self._part_outcomes: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._uses: Counter[int] = Counter()  # times handed out -> stored groups
        self._versions: Counter[PolicyVersion] = Counter()  # oldest version -> stored groups of our own

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not; see ReplayTable."""
        with self._lock:
            return [self._insert(group) for group in groups]

    def insert_parts(self, parts: Sequence[Part]) -> list[PartResult]:
        """Hold trajectories until their groups are complete; see ReplayTable."""
        with self._lock:
            return [self._insert_part(part) for part in parts]

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out a draw, or [] while it must wait; see ReplayTable. Raises Conflict for a reused request_id."""
        check_request(request, self._limiter)
        check_weighting(request.selector, self._settings.weighting)
        lots = draw_lots(request.selector, request.num_groups, self._rng)
        with self._lock:
            now_s = self._clock()
            repeated = self._draws.repeated(request, now_s)
            if repeated is not None:
                return repeated
            clock = max(request.learner_version, self._latest_version)
            self._remove_overdue(now_s, clock)
            if self._weighted is not None:
                self._weighted.wake(clock)
            pace, num_groups = self._pace(), request.num_groups
            wanted_fresh, eligible = num_fresh(request.selector, num_groups), self._num_eligible(request)
            blocked = draw_blocked(self._limiter, pace, num_groups, wanted_fresh, num_eligible=eligible)
            if blocked == "no_fit":
                raise InvalidRequest(no_fit(num_groups, wanted_fresh, pace.sampleable, pace.fresh, eligible))
            if blocked:
                self._learner_wait = refused_again(self._learner_wait, blocked, now_s)
                if blocked in ("fresh", "weight"):
                    self._wanted_fresh = fresh_needed(pace, num_groups, wanted_fresh, num_eligible=eligible)
                return []
            return self._draw(request, lots, now_s)

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; see ReplayTable."""
        with self._lock:
            self._latest_version = max(version, self._latest_version)
            self._remove_overdue(self._clock(), self._latest_version)

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """Give groups new priorities; see ReplayTable."""
        numbers = checked_priorities(self._settings.weighting, priorities)
        updated = 0
        with self._lock:
            for group_id, number in numbers.items():
                lot, sequence = self._rng.expovariate(1.0), self._sequences.get(group_id)
                if self._weighted is not None and sequence is not None and self._entries[sequence].is_train:
                    self._weighted.set_number(sequence, number, lot)
                    updated += 1
        return PriorityUpdate(updated=updated, unknown=len(numbers) - updated)

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """Return statistics of prompts; see ReplayTable."""
        check_page(limit)
        with self._lock:
            return self._prompts.page(cursor, limit)

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        with self._lock:
            return self._stored(group_id).group

    def summary(self, group_id: str) -> GroupSummary:
        """Return what browsing shows of a stored group. Raises NotFound."""
        with self._lock:
            return self._stored(group_id).summary(self._latest_version)

    def browse(self, query: GroupQuery) -> GroupPage:
        """Return one page of summaries; see ReplayTable."""
        with self._lock:
            return page_of(self._entries.values(), query, self._latest_version)

    def tidy(self) -> None:
        """Do what is due by the clock; see ServedTable."""
        with self._lock:
            now_s = self._clock()
            self._remove_overdue(now_s, self._latest_version)
            self._remembered.forget_overdue(now_s)
            for group_id in self._partials.close_overdue(now_s):
                self._remembered.add(group_id, "", self._clock())
                self._removed["partial_timeout"] += 1
            for group_id in self._partials.sealed():
                if self._insert_sealed(group_id).outcome is InsertOutcome.FULL:
                    break  # it went to the end of the line: another one is first at the next tick

    def count_malformed(self, *, groups: int = 0, parts: int = 0) -> None:
        """Count submissions that were no records; see ServedTable."""
        with self._lock:
            self._outcomes += Counter({outcome_of("malformed").value: groups})
            self._part_outcomes += Counter({outcome_of("malformed").value: parts})

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
                outcomes=dict(self._outcomes),
                part_outcomes=dict(self._part_outcomes),
                num_partial_groups=len(self._partials),
                partial_bytes=self._partials.size_bytes,
                removed=dict(self._removed),
                stored_versions=dict(+self._versions),
                stored_uses=dict(+self._uses),
                reward_sum=self._reward_sum,
                num_trajectories_total=self._num_trajectories,
                forgotten_ids_total=self._remembered.forgotten_total,
                num_prompts=len(self._prompts),
                forgotten_prompts_total=self._prompts.forgotten,
                weights_left_behind_total=self._weighted.left_behind if self._weighted is not None else 0,
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

    def _stored(self, group_id: str) -> Entry:
        if group_id not in self._sequences:
            raise NotFound(f"group {group_id!r} is not stored", hint="it may have been removed since")
        return self._entries[self._sequences[group_id]]

    # --- insert

    def _insert(self, group: Group) -> InsertResult:
        now_s = self._clock()
        record = encode_group(group)
        content = record_hash(record)
        refused = refused_at_sight(group, len(record), self._settings, self._run_id)
        lot = self._rng.expovariate(1.0) if refused is None and self._weighted is not None else 0.0
        if refused is None:
            self._remove_overdue(now_s, self._latest_version)
            self._remembered.forget_overdue(now_s)
            refused = self._refused(group, content, len(record))
        if refused is None:
            self._store(group, content, len(record), now_s, lot)
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
        if refused := refused_for_version(group, group.split, self._latest_version, self._settings):
            return refused
        if group.split is Split.TRAIN and (refused := self._refused_for_training(group)):
            return refused
        if not self._make_room(size_bytes):
            return "capacity", (len(self._entries), self._bytes)
        return None

    def _refused_for_training(self, group: Group) -> tuple[str, Facts] | None:
        share = self._settings.foreign_share
        if group.is_foreign and self._num_foreign + 1 > share * (len(self._train) + 1):
            return "foreign_share", (self._num_foreign, len(self._train), share)
        pace = self._pace()
        if not may_insert(self._limiter, pace):
            return "pace", (limiter_error(self._limiter, pace), insert_ceiling(self._limiter))
        return None

    def _known_content(self, group_id: str) -> str | None:
        if group_id in self._sequences:
            return self._entries[self._sequences[group_id]].content
        return self._remembered.content(group_id)

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

    def _store(self, group: Group, content: str, size_bytes: int, now_s: float, lot: float) -> None:
        entry = Entry(self._next_sequence, group, content, size_bytes, now_s)
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
        counts = self._prompts.count(group.prompt_id, counts_of(group, solved_reward=self._settings.solved_reward))
        if self._weighted is not None:
            self._weighted.add(entry.sequence, group, self._latest_version, counts, lot)
        self._count(entry, +1)
        self._inserted += 1
        self._num_trajectories += len(group.trajectories)
        self._reward_sum += sum(trajectory.reward for trajectory in group.trajectories)

    def _count(self, entry: Entry, change: int) -> None:
        """Enter a train group into the counters of what is stored, or take it out."""
        group = entry.group
        self._num_tokens += change * group.num_response_tokens
        self._uses[entry.uses] += change
        if group.is_foreign:
            self._num_foreign += change
        elif group.oldest_version is not None:
            self._versions[group.oldest_version] += change

    def _make_evictable(self, entry: Entry) -> None:
        heapq.heappush(self._evictable, entry.sequence)
        self._num_evictable += 1
        self._evictable_bytes += entry.size_bytes

    # --- parts

    def _insert_part(self, part: Part) -> PartResult:
        code, facts = self._hold(part)
        self._part_outcomes[outcome_of(code).value] += 1
        if code in ("pending", "held") and self._partials.is_sealed(part.group_id):
            inserted = self._insert_sealed(part.group_id)
            return part_result(part, inserted.outcome, inserted.reason)
        return part_result(part, *refusal(code, facts))

    def _hold(self, part: Part) -> tuple[str, Facts]:
        if part.run_id != self._run_id:
            return "run", ()
        now_s, record = self._clock(), encode_trajectory(part.trajectory)
        self._remembered.forget_overdue(now_s)
        if self._known_content(part.group_id) is not None:
            sequence = self._sequences.get(part.group_id)
            return judge_late(part, None if sequence is None else self._entries[sequence].group), ()
        refused = self._partials.answered(part, record) or refused_for_version(
            part.trajectory, part.split, self._latest_version, self._settings
        )
        return refused or self._partials.hold(part, record, now_s)

    def _insert_sealed(self, group_id: str) -> InsertResult:
        result = self._insert(self._partials.group(group_id))
        if result.outcome is InsertOutcome.FULL:
            self._partials.refused_again(group_id, self._clock())
            return result
        self._partials.drop(group_id)
        if self._known_content(group_id) is None:
            self._remembered.add(group_id, "", self._clock())
        return result

    # --- sample

    def _draw(self, request: SampleRequest, lots: list[float], now_s: float) -> list[Sample]:
        clock = max(request.learner_version, self._latest_version)
        chosen = self._choose(request.selector, request.num_groups, lots)
        samples = [self._hand_out(self._entries[sequence], chance, clock) for sequence, chance in chosen]
        self._sampled += len(samples)
        self._learner_wait = None
        self._wanted_fresh, self._no_room = 0, False
        self._draws.add(request, samples, now_s)
        return samples

    def _choose(self, selector: Selector, num_groups: int, lots: list[float]) -> list[tuple[int, float]]:
        """Return (sequence number, probability) of each chosen group."""
        fresh = list(self._fresh)[: num_fresh(selector, num_groups)]
        num_others = num_groups - len(fresh)
        match rest_of(selector):
            case Fifo():
                others = [(sequence, 1.0) for sequence in self._train[:num_groups] if sequence not in fresh]
            case Lifo():
                others = [(sequence, 1.0) for sequence in self._train[: -num_groups - 1 : -1] if sequence not in fresh]
            case Uniform():
                others = self._choose_uniform(fresh, lots)
            case Weighted():
                assert self._weighted is not None  # check_weighting
                others = self._weighted.draw(num_others, fresh, lots)
            case Fresh():
                others = []
        return [(sequence, 1.0) for sequence in fresh] + others[:num_others]

    def _num_eligible(self, request: SampleRequest) -> int:
        """Return how many groups the selector may choose now."""
        if self._weighted is None or not isinstance(rest_of(request.selector), Weighted):
            return len(self._train)
        return self._weighted.num_eligible

    def _choose_uniform(self, taken: list[int], lots: list[float]) -> list[tuple[int, float]]:
        ranks = [bisect_left(self._train, sequence) for sequence in taken]
        chance = 1 / max(1, len(self._train) - len(taken))
        return [(self._train[rank], chance) for rank in draw_ranks(ranks, len(self._train), lots)]

    def _hand_out(self, entry: Entry, chance: float, clock: PolicyVersion) -> Sample:
        self._uses[entry.uses] -= 1
        entry.uses += 1
        self._uses[entry.uses] += 1
        if entry.uses == 1:
            del self._fresh[entry.sequence]
            self._make_evictable(entry)
        if self._weighted is not None:
            self._weighted.hand_out(entry.sequence, clock)
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

    def _remove(self, entry: Entry, reason: str) -> None:
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
            if self._weighted is not None:
                self._weighted.remove(entry.sequence)
            self._count(entry, -1)
            if (oldest := group.oldest_version) is not None:
                self._by_version[oldest].discard(entry.sequence)
                if not self._by_version[oldest]:
                    del self._by_version[oldest]
        self._remembered.add(group.group_id, entry.content, self._clock())
