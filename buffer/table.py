"""The table protocol: what a replay buffer promises, whoever implements it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Protocol

from pydantic import Field, FiniteFloat

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.codec import EncodedGroup
from buffer.encoded import EncodedSample
from buffer.prompts import PromptPage
from buffer.selectors import Fifo, Selector
from buffer.settings import Settings
from buffer.types import Group, Identifier, InsertResult, Part, PartResult, PolicyVersion, Record, Sample
from buffer.weighting import Weighting


class TableSettings(Settings):
    """How much is kept, for how long, and how often it is handed out."""

    capacity_groups: Annotated[int, Field(ge=1)] = 100_000
    """Groups kept at most. Only groups that were sampled at least once, or are never sampled (eval), are evicted,
    oldest first."""
    capacity_bytes: Annotated[int, Field(ge=1)] = 4 << 30
    """Bytes of encoded groups kept at most; 4 GiB fits a laptop."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 1
    """Independent tables that the groups of a run are spread over by their ids, so that a Redis Cluster can share the
    load. Every limit of [table] and [limiter] is that of one shard. Fixed for the life of a run."""
    max_group_bytes: Annotated[int, Field(ge=1)] = 64 << 20
    """Largest encoded group; a larger one is `oversize`."""
    max_age_updates: Annotated[int, Field(ge=0)] | None = None
    """Hard age gate in learner updates: older groups are removed, and refused as `stale` on arrival. None = no gate."""
    reuse_limit: Annotated[int, Field(ge=1)] | None = None
    """A group leaves the table after it was handed out this often. None = only eviction removes it."""
    ttl_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a group is removed, sampled or not. None = never."""
    foreign_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest share of stored groups that may hold tokens not drawn by this run's weights; 0 refuses them."""
    weighting: Weighting | None = None
    """What weighted draws go by, such as {by = "priority", exponent = 0.6}. None = the table keeps no weights."""
    solved_reward: FiniteFloat = 1.0
    """A trajectory with at least this reward counts as solved in the statistics of its prompt."""
    max_prompts: Annotated[int, Field(ge=1)] = 1_000_000
    """Prompts with statistics at most; the one that got no group for longest is forgotten first (counted)."""
    dedup_window_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Seconds for which ids are remembered beyond removal, so that a late retry is a `duplicate`."""
    dedup_max_ids: Annotated[int, Field(ge=1)] = 1_000_000
    """Ids remembered at most, oldest forgotten first (counted)."""
    partial_group_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from the first trajectory of a group submitted in parts until it is closed, complete or not."""
    min_group_size: Annotated[int, Field(ge=1)] = 2
    """A group closed by time-out is kept with at least so many trajectories, else dropped; a baseline needs two."""
    partial_max_groups: Annotated[int, Field(ge=1)] = 10_000
    """Partial groups held at most; a part that would open one more is `full`."""
    partial_max_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    """Bytes of partial groups held at most, beside `capacity_bytes`; a part that goes beyond is `full`."""
    repeat_window_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds within which a repeated sample request_id returns the same draw."""
    repeat_max_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    """Bytes of removed groups kept for such repeats at most, beside `capacity_bytes`; those whose window ends first are
    dropped first (counted), but none of a draw that is being made. Should hold the groups of several draws."""


class SampleRequest(Record):
    """One draw."""

    num_groups: Annotated[int, Field(ge=1, le=65_536)]
    learner_version: Annotated[int, Field(ge=0, lt=1 << 53)]
    """The learner's update clock: ages are measured against it."""
    request_id: Identifier
    """A repeat within `repeat_window_s` returns the same draw, counted once."""
    selector: Selector = Fifo()


class PriorityUpdate(Record):
    """What became of posted priorities."""

    updated: int
    unknown: int
    """Ids that are not stored train groups, mostly because they left meanwhile; ignored."""


class Wait(Record):
    """Who waits for whom."""

    who: str
    """`learner` or `actors`."""
    since_s: FiniteFloat
    """Seconds since the wait began."""
    reason: str


class TableStats(Record):
    """Everything a dashboard needs, read in constant time from counters."""

    num_groups: int
    """Stored train groups."""
    num_fresh: int
    """Stored train groups that were never handed out."""
    num_eval: int
    num_foreign: int
    bytes: int
    num_response_tokens: int
    """Response tokens of the stored train groups."""
    inserted_total: int
    """Train groups ever accepted."""
    sampled_total: int
    """Train groups ever handed out, repeats of a request_id not counted."""
    reuse_mean: float
    """Times a group was handed out, on average over the train groups that were handed out at all; 0 before that."""
    outcomes: dict[str, int]
    """Submitted groups by outcome, all time."""
    part_outcomes: dict[str, int]
    """Submitted parts by outcome, all time; one that completes its group is `pending` here, its group is above."""
    num_partial_groups: int
    """Groups submitted in parts that are not stored yet."""
    partial_bytes: int
    repeat_bytes: int
    """Bytes of removed groups that are kept for repeats of their draws."""
    dropped_repeats_total: int
    """Removed groups dropped before their `repeat_window_s` was over because `repeat_max_bytes` was reached."""
    removed: dict[str, int]
    """Removed groups by reason: capacity, age, age_unsampled, reuse, ttl, ttl_unsampled; all time. partial_timeout:
    groups that never had `min_group_size` trajectories."""
    forgotten_ids_total: int
    """Ids forgotten before `dedup_window_s` because `dedup_max_ids` was reached."""
    num_prompts: int
    """Prompts with statistics."""
    forgotten_prompts_total: int
    """Prompts whose statistics were dropped because `max_prompts` was reached."""
    weights_left_behind_total: int
    """Stored groups that kept their weight by difficulty when that of their prompt changed, added up over inserts."""
    stored_versions: dict[int, int]
    """Oldest policy version -> stored groups; foreign groups are not in it."""
    stored_uses: dict[int, int]
    """Times handed out -> stored groups."""
    reward_sum: float
    """Sum over all accepted train trajectories of their reward."""
    num_trajectories_total: int
    """Train trajectories ever accepted."""
    latest_version: PolicyVersion
    """Latest published version; -1 before the first."""
    limiter_error: float
    """(inserted - removed unsampled by age or ttl) x samples_per_insert - sampled."""
    waits: list[Wait]


class ReplayTable(Protocol):
    """A replay buffer. No method blocks on pacing: `sample` that may not proceed returns [], and the caller waits."""

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """Store each group or say why not, in the order given; atomic and idempotent per group.

        An actor calls it after each batch of generation. `full` means: try again later.
        Raises StoreUnavailable when the store refuses; then nothing was acknowledged.
        """
        ...

    def insert_parts(self, parts: Sequence[Part]) -> list[PartResult]:
        """Hold trajectories until their groups are complete, then insert the groups; idempotent per trajectory.

        An agent that finishes one response at a time calls it. `full` means: submit the same part again later.
        Raises StoreUnavailable when the store refuses; then nothing was acknowledged.
        """
        ...

    def sample(self, request: SampleRequest) -> list[Sample]:
        """Hand out exactly `num_groups` distinct groups, or [] while the limiter or the selector cannot.

        The learner calls it. Sampling does not remove, except by `reuse_limit`. Raises InvalidRequest for a draw that
        could never be served under the limiter's settings, DrawLost for a repeat whose groups are no longer kept.
        """
        ...

    def advance_version(self, version: PolicyVersion) -> None:
        """Record the latest published version; groups that the age gate closes are removed. Never goes back."""
        ...

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """Give groups new priorities, by group_id; ids that are not stored are ignored and counted.

        The learner calls it after a step. A new group enters with the largest priority posted so far, or 1 before the
        first above 0. Raises InvalidRequest, with nothing changed, for a priority that is not in [0, 1e18], and where
        table.weighting has no use for priorities.
        """
        ...

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """Return the statistics of up to `limit` prompts whose ids come after `cursor`, in O(log n + limit).

        A curriculum or a browser calls it. Raises InvalidRequest for a limit outside [1, 1000].
        """
        ...

    def get(self, group_id: str) -> Group:
        """Return a stored group. Raises NotFound."""
        ...

    def summary(self, group_id: str) -> GroupSummary:
        """Return what is known about a stored group, its tokens apart. Raises NotFound."""
        ...

    def browse(self, query: GroupQuery) -> GroupPage:
        """Return one page of stored groups in the order of insertion."""
        ...

    def stats(self) -> TableStats:
        """Return the counters in constant time."""
        ...


class ServedTable(ReplayTable, Protocol):
    """A table with what only its service calls; any number of services may call at once."""

    def insert_encoded(self, groups: Sequence[EncodedGroup]) -> list[InsertResult]:
        """Store groups as `insert` does, whose canonical records are at hand."""
        ...

    def sample_encoded(self, request: SampleRequest) -> Iterator[list[EncodedSample]]:
        """Draw as `sample` does, at once, and give the groups as bytes, some at each step; nothing while it must wait.

        Raises on the way StoreUnavailable when the store goes away, DrawLost when the reader was so slow that groups,
        removed meanwhile, are no longer kept.
        """
        ...

    def tidy(self) -> None:
        """Do what is due by the clock: remove overdue groups, close overdue partial groups, insert sealed ones.

        The janitor calls it at each tick.
        """
        ...

    def count_malformed(self, *, groups: int = 0, parts: int = 0) -> None:
        """Count submissions as `invalid` that were no records, so that no table saw them."""
        ...
