"""A group as MemoryTable keeps it."""

from collections.abc import Iterable
from dataclasses import dataclass

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.staleness import age_updates
from buffer.types import Group, PolicyVersion, Split


@dataclass(slots=True)
class Entry:
    """A stored group and what happened to it."""

    sequence: int
    group: Group
    content: str
    size_bytes: int
    inserted_s: float
    uses: int = 0
    used_s: float = 0.0
    """Time of the last use; 0 = never."""

    @property
    def is_train(self) -> bool:
        """Whether it can be sampled."""
        return self.group.split is Split.TRAIN

    def summary(self, latest: PolicyVersion) -> GroupSummary:
        """Return what browsing shows of it."""
        group = self.group
        return GroupSummary(
            sequence=self.sequence,
            group_id=group.group_id,
            prompt_id=group.prompt_id,
            split=group.split,
            inserted_s=self.inserted_s,
            oldest_version=group.oldest_version,
            age_updates=age_updates(latest, group.oldest_version),
            times_sampled=self.uses,
            num_trajectories=len(group.trajectories),
            num_response_tokens=group.num_response_tokens,
            bytes=self.size_bytes,
            mean_reward=sum(trajectory.reward for trajectory in group.trajectories) / len(group.trajectories),
        )


def page_of(entries: Iterable[Entry], query: GroupQuery, latest: PolicyVersion) -> GroupPage:
    """Return a page of all stored entries, given in the order of insertion; in memory this is a scan."""
    chosen = [entry for entry in entries if _matches(entry, query)]
    if not query.oldest_first:
        chosen.reverse()
    shown = chosen[: query.limit]
    cursor = str(shown[-1].sequence) if len(chosen) > len(shown) else None
    return GroupPage(groups=[entry.summary(latest) for entry in shown], cursor=cursor)


def _matches(entry: Entry, query: GroupQuery) -> bool:
    if query.cursor is not None:
        passed = int(query.cursor)
        if entry.sequence <= passed if query.oldest_first else entry.sequence >= passed:
            return False
    if query.unused and (entry.uses or not entry.is_train):
        return False
    return query.split in (None, entry.group.split) and query.prompt_id in (None, entry.group.prompt_id)
