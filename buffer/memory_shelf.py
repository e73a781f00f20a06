"""What MemoryTable stores: groups in the order of insertion, the indexes that find them, and the counters of both."""

import heapq
from bisect import bisect_left
from collections import Counter

from buffer.memory_entry import Entry
from buffer.prompts import MemoryPrompts, counts_of
from buffer.remembered import KeptForRepeats, RememberedIds
from buffer.selectors import Choice, Fifo, Fresh, Lifo, Selector, Uniform, Weighted, draw_ranks, num_fresh, rest_of
from buffer.staleness import age_updates, is_too_old
from buffer.table import TableSettings
from buffer.types import Group, PolicyVersion, Sample, SampleInfo
from buffer.weighted_index import WeightedIndex


class Shelf:
    """The stored groups of a MemoryTable, which calls every method under its lock."""

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._next_sequence = 0
        self.entries: dict[int, Entry] = {}  # by sequence number, in the order of insertion
        self.sequences: dict[str, int] = {}  # of stored groups, by group_id
        self.train: list[int] = []  # ascending
        self.fresh: dict[int, None] = {}  # an ordered set
        self._evictable: list[int] = []  # a heap; removed groups stay in it until they are popped
        self._by_version: dict[PolicyVersion, set[int]] = {}
        self.prompts = MemoryPrompts(settings.max_prompts)
        self.weighted = WeightedIndex(settings.weighting) if settings.weighting is not None else None
        self.remembered = RememberedIds(settings)
        self.repeats = KeptForRepeats(settings)
        self.bytes = self._evictable_bytes = self._num_evictable = self.num_foreign = self.num_tokens = 0
        self.removed: Counter[str] = Counter()
        self.uses: Counter[int] = Counter()  # times handed out -> stored groups
        self.versions: Counter[PolicyVersion] = Counter()  # oldest version -> stored groups of our own

    def known_content(self, group_id: str) -> str | None:
        """Return the content of the stored or remembered group of this id; None = a new id."""
        if group_id in self.sequences:
            return self.entries[self.sequences[group_id]].content
        return self.remembered.content(group_id)

    def make_room(self, size_bytes: int, now_s: float) -> bool:
        """Evict what may be evicted until one more group fits; evict nothing when it would not help."""
        settings = self._settings
        kept_groups, kept_bytes = len(self.entries) - self._num_evictable, self.bytes - self._evictable_bytes
        if kept_groups >= settings.capacity_groups or kept_bytes + size_bytes > settings.capacity_bytes:
            return False
        while len(self.entries) >= settings.capacity_groups or self.bytes + size_bytes > settings.capacity_bytes:
            entry = self.entries.get(heapq.heappop(self._evictable))
            if entry is not None:
                self.remove(entry, "capacity", now_s)
        return True

    def add(
        self, group: Group, content: str, size_bytes: int, now_s: float, *, lot: float, latest: PolicyVersion
    ) -> None:
        """Store a group; `lot` orders weighted draws."""
        entry = Entry(self._next_sequence, group, content, size_bytes, now_s)
        self._next_sequence += 1
        self.entries[entry.sequence] = entry
        self.sequences[group.group_id] = entry.sequence
        self.bytes += size_bytes
        if not entry.is_train:
            self._make_evictable(entry)
            return
        self.train.append(entry.sequence)
        self.fresh[entry.sequence] = None
        if (oldest := group.oldest_version) is not None:
            self._by_version.setdefault(oldest, set()).add(entry.sequence)
        counts = self.prompts.count(group.prompt_id, counts_of(group, solved_reward=self._settings.solved_reward))
        if self.weighted is not None:
            self.weighted.add(entry.sequence, group, latest, counts, lot)
        self._count(entry, +1)

    def remove_overdue(self, now_s: float, clock: PolicyVersion) -> None:
        """Remove what the TTL and the age gate close, and forget what no repeat can ask for any more."""
        self.repeats.drop_overdue(now_s)
        if self._settings.ttl_s is not None:
            overdue = [e for e in self.entries.values() if e.inserted_s <= now_s - self._settings.ttl_s]
            for entry in overdue:
                self.remove(entry, "ttl_unsampled" if entry.is_train and not entry.uses else "ttl", now_s)
        for version in [v for v in self._by_version if is_too_old(clock, v, self._settings.max_age_updates)]:
            for sequence in sorted(self._by_version[version]):
                entry = self.entries[sequence]
                self.remove(entry, "age" if entry.uses else "age_unsampled", now_s)

    def remove(self, entry: Entry, reason: str, now_s: float) -> None:
        """Take a group out, and remember its id."""
        group = entry.group
        del self.entries[entry.sequence], self.sequences[group.group_id]
        self.bytes -= entry.size_bytes
        self.removed[reason] += 1
        if entry.uses or not entry.is_train:
            self._num_evictable -= 1
            self._evictable_bytes -= entry.size_bytes
        if entry.is_train:
            del self.train[bisect_left(self.train, entry.sequence)]
            self.fresh.pop(entry.sequence, None)
            if self.weighted is not None:
                self.weighted.remove(entry.sequence)
            self._count(entry, -1)
            if (oldest := group.oldest_version) is not None:
                self._by_version[oldest].discard(entry.sequence)
                if not self._by_version[oldest]:
                    del self._by_version[oldest]
        self.remembered.add(group.group_id, entry.content, now_s)
        self.repeats.add(entry.sequence, entry.size_bytes, entry.used_s, now_s)

    def choose(self, selector: Selector, num_groups: int, lots: list[float]) -> list[Choice]:
        """Return what the selector draws."""
        fresh = list(self.fresh)[: num_fresh(selector, num_groups)]
        num_others = num_groups - len(fresh)
        match rest_of(selector):
            case Fifo():
                others = [Choice(sequence) for sequence in self.train[:num_groups] if sequence not in fresh]
            case Lifo():
                others = [Choice(sequence) for sequence in self.train[: -num_groups - 1 : -1] if sequence not in fresh]
            case Uniform():
                others = self._choose_uniform(fresh, lots)
            case Weighted():
                assert self.weighted is not None  # check_weighting
                others = self.weighted.draw(num_others, fresh, lots)
            case Fresh():
                others = []
        return [Choice(sequence) for sequence in fresh] + others[:num_others]

    def num_eligible(self, selector: Selector) -> int:
        """Return how many groups the selector may choose now."""
        if self.weighted is None or not isinstance(rest_of(selector), Weighted):
            return len(self.train)
        return self.weighted.num_eligible

    def hand_out(self, choice: Choice, clock: PolicyVersion, now_s: float) -> Sample:
        """Count one use of a chosen group, its last one if the reuse limit says so."""
        entry = self.entries[choice.sequence]
        self.uses[entry.uses] -= 1
        entry.uses += 1
        entry.used_s = now_s
        self.uses[entry.uses] += 1
        if entry.uses == 1:
            del self.fresh[entry.sequence]
            self._make_evictable(entry)
        if self.weighted is not None:
            self.weighted.hand_out(entry.sequence, clock)
        info = SampleInfo(
            probability=choice.probability,
            num_candidates=choice.num_candidates,
            times_sampled=entry.uses,
            age_updates=age_updates(clock, entry.group.oldest_version),
        )
        if self._settings.reuse_limit is not None and entry.uses >= self._settings.reuse_limit:
            self.remove(entry, "reuse", now_s)
        return Sample(group=entry.group, info=info)

    def _choose_uniform(self, taken: list[int], lots: list[float]) -> list[Choice]:
        ranks = [bisect_left(self.train, sequence) for sequence in taken]
        number = max(1, len(self.train) - len(taken))
        return [Choice(self.train[rank], 1 / number, number) for rank in draw_ranks(ranks, len(self.train), lots)]

    def _count(self, entry: Entry, change: int) -> None:
        """Enter a train group into the counters of what is stored, or take it out."""
        group = entry.group
        self.num_tokens += change * group.num_response_tokens
        self.uses[entry.uses] += change
        if group.is_foreign:
            self.num_foreign += change
        elif group.oldest_version is not None:
            self.versions[group.oldest_version] += change

    def _make_evictable(self, entry: Entry) -> None:
        heapq.heappush(self._evictable, entry.sequence)
        self._num_evictable += 1
        self._evictable_bytes += entry.size_bytes
