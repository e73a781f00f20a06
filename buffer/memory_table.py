"""The replay table in the memory of one process: for tests, for trying things out, and as the meaning of RedisTable."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.codec import EncodedGroup, encode_group, encode_trajectory, encoded, record_hash
from buffer.encoded import EncodedSample
from buffer.errors import InvalidRequest, NotFound
from buffer.memory_entry import Entry, page_of
from buffer.memory_shelf import Shelf
from buffer.outcomes import Facts, draw_lost, no_fit, outcome_of, refusal, refused_at_sight, refused_for_version
from buffer.parts import PartialGroups, judge_late, part_result
from buffer.prompts import PromptPage, check_page
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
    reuse_mean,
)
from buffer.remembered import RememberedDraw, RememberedDraws
from buffer.selectors import check_weighting, draw_lots, num_fresh
from buffer.table import PriorityUpdate, SampleRequest, TableSettings, TableStats
from buffer.types import Group, InsertOutcome, InsertResult, Part, PartResult, PolicyVersion, Sample, Split
from buffer.waits import Waiting, refused_again, report
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
        self._shelf = Shelf(settings)
        self._partials = PartialGroups(settings)
        self._draws = RememberedDraws(settings)
        self._learner_wait: Waiting | None = None
        self._actors_wait: Waiting | None = None
        self._wanted_fresh = 0
        self._no_room = False
        self._inserted = self._sampled = self._num_trajectories = 0
        self._reward_sum = 0.0
        self._outcomes: Counter[str] = Counter()
        self._part_outcomes: Counter[str] = Counter()

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not; see ReplayTable."""
        return self.insert_encoded([encoded(group) for group in groups])

    def insert_encoded(self, groups: Sequence[EncodedGroup]) -> list[InsertResult]:
        """Store each group or say why not; see ServedTable."""
        with self._lock:
            return [self._insert(*group) for group in groups]

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
                if any(
                    s not in self._shelf.entries and s not in self._shelf.repeats.sequences for s in repeated.sequences
                ):
                    raise draw_lost()
                return repeated.samples
            clock = max(request.learner_version, self._latest_version)
            self._shelf.remove_overdue(now_s, clock)
            if self._shelf.weighted is not None:
                self._shelf.weighted.wake(clock)
            pace, num_groups = self._pace(), request.num_groups
            wanted_fresh, eligible = num_fresh(request.selector, num_groups), self._shelf.num_eligible(request.selector)
            blocked = draw_blocked(self._limiter, pace, num_groups, wanted_fresh, num_eligible=eligible)
            if blocked == "no_fit":
                raise InvalidRequest(no_fit(num_groups, wanted_fresh, pace.sampleable, pace.fresh, eligible))
            if blocked:
                self._learner_wait = refused_again(self._learner_wait, blocked, now_s)
                if blocked in ("fresh", "weight"):
                    self._wanted_fresh = fresh_needed(pace, num_groups, wanted_fresh, num_eligible=eligible)
                return []
            return self._draw(request, lots, now_s)

    def sample_encoded(self, request: SampleRequest) -> Iterator[list[EncodedSample]]:
        """Draw, and encode what was drawn; see ServedTable."""
        if samples := self.sample(request):
            yield [EncodedSample(encode_group(sample.group), **dict(sample.info)) for sample in samples]

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; see ReplayTable."""
        with self._lock:
            self._latest_version = max(version, self._latest_version)
            self._shelf.remove_overdue(self._clock(), self._latest_version)

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """Give groups new priorities; see ReplayTable."""
        numbers = checked_priorities(self._settings.weighting, priorities)
        updated = 0
        with self._lock:
            for group_id, number in numbers.items():
                lot, sequence = self._rng.expovariate(1.0), self._shelf.sequences.get(group_id)
                if self._shelf.weighted is not None and sequence is not None and self._shelf.entries[sequence].is_train:
                    self._shelf.weighted.set_number(sequence, number, lot)
                    updated += 1
        return PriorityUpdate(updated=updated, unknown=len(numbers) - updated)

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """Return statistics of prompts; see ReplayTable."""
        check_page(limit)
        with self._lock:
            return self._shelf.prompts.page(cursor, limit)

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
            return page_of(self._shelf.entries.values(), query, self._latest_version)

    def tidy(self) -> None:
        """Do what is due by the clock; see ServedTable."""
        with self._lock:
            now_s = self._clock()
            self._shelf.remove_overdue(now_s, self._latest_version)
            self._shelf.remembered.forget_overdue(now_s)
            for group_id in self._partials.close_overdue(now_s):
                self._shelf.remembered.add(group_id, "", self._clock())
                self._shelf.removed["partial_timeout"] += 1
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
                num_groups=len(self._shelf.train),
                num_fresh=len(self._shelf.fresh),
                num_eval=len(self._shelf.entries) - len(self._shelf.train),
                num_foreign=self._shelf.num_foreign,
                bytes=self._shelf.bytes,
                num_response_tokens=self._shelf.num_tokens,
                inserted_total=self._inserted,
                sampled_total=self._sampled,
                reuse_mean=reuse_mean(pace),
                outcomes=dict(self._outcomes),
                part_outcomes=dict(self._part_outcomes),
                num_partial_groups=len(self._partials),
                partial_bytes=self._partials.size_bytes,
                repeat_bytes=self._shelf.repeats.bytes,
                dropped_repeats_total=self._shelf.repeats.dropped_total,
                removed=dict(self._shelf.removed),
                stored_versions=dict(+self._shelf.versions),
                stored_uses=dict(+self._shelf.uses),
                reward_sum=self._reward_sum,
                num_trajectories_total=self._num_trajectories,
                forgotten_ids_total=self._shelf.remembered.forgotten_total,
                num_prompts=len(self._shelf.prompts),
                forgotten_prompts_total=self._shelf.prompts.forgotten,
                weights_left_behind_total=self._shelf.weighted.left_behind if self._shelf.weighted is not None else 0,
                latest_version=self._latest_version,
                limiter_error=limiter_error(self._limiter, pace),
                waits=report(
                    self._learner_wait, self._actors_wait, limiter=self._limiter, pace=pace, now_s=self._clock()
                ),
            )

    def _pace(self) -> Pace:
        unused = self._shelf.removed["age_unsampled"] + self._shelf.removed["ttl_unsampled"]
        return Pace(
            sampleable=len(self._shelf.train),
            fresh=len(self._shelf.fresh),
            inserted=self._inserted - unused,
            sampled=self._sampled,
            wanted_fresh=self._wanted_fresh,
            no_room=self._no_room,
        )

    def _stored(self, group_id: str) -> Entry:
        if group_id not in self._shelf.sequences:
            raise NotFound(f"group {group_id!r} is not stored", hint="it may have been removed since")
        return self._shelf.entries[self._shelf.sequences[group_id]]

    # --- insert

    def _insert(self, group: Group, record: bytes) -> InsertResult:
        now_s = self._clock()
        content = record_hash(record)
        refused = refused_at_sight(group, len(record), self._settings, self._run_id)
        lot = self._rng.expovariate(1.0) if refused is None and self._shelf.weighted is not None else 0.0
        if refused is None:
            self._shelf.remove_overdue(now_s, self._latest_version)
            self._shelf.remembered.forget_overdue(now_s)
            refused = self._refused(group, content, len(record))
        if refused is None:
            self._shelf.add(group, content, len(record), now_s, lot=lot, latest=self._latest_version)
            self._actors_wait, self._no_room = None, False
            if group.split is Split.TRAIN:
                self._inserted += 1
                self._num_trajectories += len(group.trajectories)
                self._reward_sum += sum(trajectory.reward for trajectory in group.trajectories)
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
        if (known := self._shelf.known_content(group.group_id)) is not None:
            return ("stored" if known == content else "conflict"), ()
        if refused := refused_for_version(group, group.split, self._latest_version, self._settings):
            return refused
        if group.split is Split.TRAIN and (refused := self._refused_for_training(group)):
            return refused
        if not self._shelf.make_room(size_bytes, self._clock()):
            return "capacity", (len(self._shelf.entries), self._shelf.bytes)
        return None

    def _refused_for_training(self, group: Group) -> tuple[str, Facts] | None:
        share = self._settings.foreign_share
        if group.is_foreign and self._shelf.num_foreign + 1 > share * (len(self._shelf.train) + 1):
            return "foreign_share", (self._shelf.num_foreign, len(self._shelf.train), share)
        pace = self._pace()
        if not may_insert(self._limiter, pace):
            return "pace", (limiter_error(self._limiter, pace), insert_ceiling(self._limiter))
        return None

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
        self._shelf.remembered.forget_overdue(now_s)
        if self._shelf.known_content(part.group_id) is not None:
            sequence = self._shelf.sequences.get(part.group_id)
            return judge_late(part, None if sequence is None else self._shelf.entries[sequence].group), ()
        refused = self._partials.answered(part, record) or refused_for_version(
            part.trajectory, part.split, self._latest_version, self._settings
        )
        return refused or self._partials.hold(part, record, now_s)

    def _insert_sealed(self, group_id: str) -> InsertResult:
        result = self._insert(*encoded(self._partials.group(group_id)))
        if result.outcome is InsertOutcome.FULL:
            self._partials.refused_again(group_id, self._clock())
            return result
        self._partials.drop(group_id)
        if self._shelf.known_content(group_id) is None:
            self._shelf.remembered.add(group_id, "", self._clock())
        return result

    # --- sample

    def _draw(self, request: SampleRequest, lots: list[float], now_s: float) -> list[Sample]:
        clock = max(request.learner_version, self._latest_version)
        chosen = self._shelf.choose(request.selector, request.num_groups, lots)
        samples = [self._shelf.hand_out(choice, clock, now_s) for choice in chosen]
        self._sampled += len(samples)
        self._learner_wait = None
        self._wanted_fresh, self._no_room = 0, False
        self._draws.add(RememberedDraw(request, now_s, [choice.sequence for choice in chosen], samples))
        return samples
