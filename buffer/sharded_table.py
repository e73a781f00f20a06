"""Several tables as one: groups lie where their ids hash to, and each draw is made by one shard, chosen by weight."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.codec import EncodedGroup, encoded
from buffer.encoded import EncodedSample
from buffer.errors import InvalidRequest
from buffer.prompts import PromptCounts, PromptPage, PromptStats, check_page, prompt_page
from buffer.rate_limiter import Pace, RateLimiterSettings, check_request, reuse_mean
from buffer.selectors import Uniform, Weighted, check_weighting, num_fresh, rest_of
from buffer.sharding import Opening, Shard, shard_of, shares
from buffer.table import PriorityUpdate, SampleRequest, TableSettings, TableStats, Wait
from buffer.types import Group, InsertResult, Part, PartResult, PolicyVersion, Sample
from buffer.weighting import checked_priorities


class ShardedTable:
    """A ReplayTable over shards that know nothing of each other; each has `settings` and `limiter` for itself.

    Whatever has an id goes to the shard of the id. A draw is made whole by one shard, chosen among those that need not
    wait in proportion to what it may choose from there; so `probability` is the share of all of them together, fifo is
    the order within a shard, and the limiter's numbers are those of a shard. A shard that does not answer fails what
    needs it: inserts of its ids, and all draws, whose probabilities could not be told.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: TableSettings,
        limiter: RateLimiterSettings,
        *,
        rng: random.Random | None = None,
        place: Callable[[str, int], int] = shard_of,
    ) -> None:
        self._shards, self._settings, self._limiter = shards, settings, limiter
        self._rng, self._place = rng or random.Random(), place

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group in its shard or say why not; see ReplayTable."""
        return self.insert_encoded([encoded(group) for group in groups])

    def insert_encoded(self, groups: Sequence[EncodedGroup]) -> list[InsertResult]:
        """Store each group in its shard or say why not; see ServedTable."""
        results: dict[int, InsertResult] = {}
        for shard, indexes in self._by_shard([group.group_id for group, _ in groups]).items():
            judged = self._shards[shard].insert_encoded([groups[index] for index in indexes])
            results |= zip(indexes, judged, strict=True)
        return [results[index] for index in range(len(groups))]

    def insert_parts(self, parts: Sequence[Part]) -> list[PartResult]:
        """Hold trajectories in the shards of their groups; see ReplayTable."""
        results: dict[int, PartResult] = {}
        for shard, indexes in self._by_shard([part.group_id for part in parts]).items():
            results |= zip(indexes, self._shards[shard].insert_parts([parts[index] for index in indexes]), strict=True)
        return [results[index] for index in range(len(parts))]

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out a draw of one shard, or [] while all must wait; see ReplayTable."""
        return [sample.decoded() for samples in self.sample_encoded(request) for sample in samples]

    def sample_encoded(self, request: SampleRequest) -> Iterator[list[EncodedSample]]:
        """Draw from one shard at once, and read the groups as they are asked for; see ServedTable.

        The choice is pinned where the request id hashes to, so that a repeat asks the same shard. When that one must
        wait after all, it first promises never to make the draw: only then another one is pinned.
        """
        check_request(request, self._limiter)
        check_weighting(request.selector, self._settings.weighting)
        home = self._of(request.request_id)
        pinned = home.pin(request.request_id)
        while True:
            if pinned:
                shard, share, others = pinned.split()
                chunks = self._shards[int(shard)].draw_or_leave(request)
                if chunks is not None:
                    return _of_all_shards(chunks, request, share=float(share), others=int(others))
            choice = self._choose(request)
            if not choice:
                return iter(())
            pinned = home.pin(request.request_id, known=pinned, choice=choice)

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version in every shard; see ReplayTable."""
        for shard in self._shards:
            shard.advance_version(version)

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """Give groups new priorities; see ReplayTable."""
        checked_priorities(self._settings.weighting, priorities)  # all of them, before the first shard is changed
        names = list(priorities)
        updated = unknown = 0
        for shard, indexes in self._by_shard(names).items():
            update = self._shards[shard].update_priorities(
                {names[index]: priorities[names[index]] for index in indexes}
            )
            updated, unknown = updated + update.updated, unknown + update.unknown
        return PriorityUpdate(updated=updated, unknown=unknown)

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """Return statistics of prompts, added up over the shards; see ReplayTable."""
        check_page(limit)
        totals: dict[str, PromptCounts] = {}
        pages = [shard.prompts(cursor, limit) for shard in self._shards]
        for stats in (stats for page in pages for stats in page.prompts):
            counts = _counts(stats)
            totals[stats.prompt_id] = totals[stats.prompt_id].plus(counts) if stats.prompt_id in totals else counts
        page = prompt_page([totals[name].stats(name) for name in sorted(totals)][: limit + 1], limit)
        if page.next_cursor is None and any(other.next_cursor is not None for other in pages):
            return page.model_copy(update={"next_cursor": page.prompts[-1].prompt_id})
        return page

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        return self._of(group_id).get(group_id)

    def summary(self, group_id: str) -> GroupSummary:
        """Return what browsing shows of a stored group. Raises NotFound."""
        return self._numbered(self._of(group_id).summary(group_id), self._place(group_id, len(self._shards)))

    def browse(self, query: GroupQuery) -> GroupPage:
        """Return one page of summaries; the shards take turns, each in its own order of insertion. See ReplayTable."""
        found: list[GroupSummary] = []
        is_last = True
        for number, shard in enumerate(self._shards):
            page = shard.browse(query.model_copy(update={"cursor": self._local_cursor(query, number)}))
            found += [self._numbered(summary, number) for summary in page.groups]
            is_last = is_last and page.cursor is None
        found.sort(key=lambda summary: summary.sequence, reverse=not query.oldest_first)
        shown = found[: query.limit]
        is_last = is_last and len(found) <= query.limit
        return GroupPage(groups=shown, cursor=None if is_last else str(shown[-1].sequence))

    def tidy(self) -> None:
        """Do in each shard what is due by the clock; see ServedTable."""
        for shard in self._shards:
            shard.tidy()

    def count_malformed(self, *, groups: int = 0, parts: int = 0) -> None:
        """Count submissions that were no records, in the first shard; see ServedTable."""
        self._shards[0].count_malformed(groups=groups, parts=parts)

    def stats(self) -> TableStats:
        """Return the counters, added up; the latest version is what all shards have."""
        return _sum([shard.stats() for shard in self._shards])

    def _of(self, name: str) -> Shard:
        return self._shards[self._place(name, len(self._shards))]

    def _by_shard(self, names: Sequence[str]) -> dict[int, list[int]]:
        """Return the indexes of the names by shard."""
        indexes: dict[int, list[int]] = {}
        for index, name in enumerate(names):
            indexes.setdefault(self._place(name, len(self._shards)), []).append(index)
        return indexes

    def _choose(self, request: SampleRequest) -> str:
        """Return a pin on one of the shards that need not wait, by lot; "" when there is none.

        Raises InvalidRequest when every shard is full with too little for the draw.
        """
        openings: list[Opening | None] = []
        misfits: list[InvalidRequest] = []
        for shard in self._shards:
            try:
                openings.append(shard.look(request))
            except InvalidRequest as error:
                openings.append(None)
                misfits.append(error)
        if len(misfits) == len(self._shards):
            raise misfits[0]
        if not any(openings):
            return ""
        chances = shares(openings)
        (chosen,) = self._rng.choices(range(len(chances)), chances)
        others = sum(opening.groups for number, opening in enumerate(openings) if opening and number != chosen)
        return f"{chosen} {chances[chosen]!r} {others}"

    def _numbered(self, summary: GroupSummary, shard: int) -> GroupSummary:
        """Return a summary whose sequence number no other shard gives."""
        return summary.model_copy(update={"sequence": summary.sequence * len(self._shards) + shard})

    def _local_cursor(self, query: GroupQuery, shard: int) -> str | None:
        """Return the cursor of a shard: the last of its own numbers that lies at or before that of the page before."""
        if query.cursor is None:
            return None
        behind = int(query.cursor) - shard
        return str(max(0, behind // len(self._shards) if query.oldest_first else -(-behind // len(self._shards))))


def _of_all_shards(
    chunks: Iterator[list[EncodedSample]], request: SampleRequest, *, share: float, others: int
) -> Iterator[list[EncodedSample]]:
    """Yield the samples, those drawn by lot with the chance of their shard and the candidates of the `others`."""
    rest = rest_of(request.selector)
    by_lot = isinstance(rest, Uniform) or (isinstance(rest, Weighted) and rest.by != "rank")
    left_as_they_are = num_fresh(request.selector, request.num_groups) if by_lot else request.num_groups
    for samples in chunks:
        yield [
            sample
            if number < left_as_they_are
            else sample._replace(probability=sample.probability * share, num_candidates=sample.num_candidates + others)
            for number, sample in enumerate(samples)
        ]
        left_as_they_are -= len(samples)


def _counts(stats: PromptStats) -> PromptCounts:
    return PromptCounts(stats.seen, stats.solved, stats.reward_mean * stats.seen, stats.last_version)


_SUMMED = ["num_groups", "num_fresh", "num_eval", "num_foreign", "bytes", "num_response_tokens", "inserted_total"]
_SUMMED += ["sampled_total", "num_partial_groups", "partial_bytes", "forgotten_ids_total", "num_prompts", "reward_sum"]
_SUMMED += ["repeat_bytes", "dropped_repeats_total"]
_SUMMED += ["forgotten_prompts_total", "weights_left_behind_total", "num_trajectories_total", "limiter_error"]
_MERGED = ["outcomes", "part_outcomes", "removed", "stored_versions", "stored_uses"]


def _sum(shards: Sequence[TableStats]) -> TableStats:
    plain = [dict(stats) for stats in shards]
    total = {name: sum(stats[name] for stats in plain) for name in _SUMMED}
    total |= {name: dict(sum((Counter(stats[name]) for stats in plain), Counter())) for name in _MERGED}
    unused = total["removed"].get("age_unsampled", 0) + total["removed"].get("ttl_unsampled", 0)
    pace = Pace(
        sampleable=total["num_groups"],
        fresh=total["num_fresh"],
        inserted=total["inserted_total"] - unused,
        sampled=total["sampled_total"],
    )
    latest = min(stats.latest_version for stats in shards)
    return TableStats(**total, reuse_mean=reuse_mean(pace), latest_version=latest, waits=_waits(shards))


def _waits(shards: Sequence[TableStats]) -> list[Wait]:
    """Return who waits: the learner only while every shard makes it wait, the actors as soon as one does."""
    fullest_first = sorted(shards, key=lambda stats: -stats.num_groups)
    waits = {
        who: [wait for stats in fullest_first for wait in stats.waits if wait.who == who]
        for who in ("learner", "actors")
    }
    told: list[Wait] = []
    if len(waits["learner"]) == len(shards):
        since_s = min(wait.since_s for wait in waits["learner"])
        told.append(waits["learner"][0].model_copy(update={"since_s": since_s}))
    if waits["actors"]:
        told.append(max(waits["actors"], key=lambda wait: wait.since_s))
    return told
