"""What is known of each prompt, for curricula: counted beside the groups, and kept when they leave."""

from bisect import bisect_right, insort
from typing import NamedTuple

from buffer.errors import InvalidRequest
from buffer.types import Group, PolicyVersion, Record

MAX_PAGE = 1000
"""Most records of one page: a page costs Redis well under a millisecond."""


class PromptStats(Record):
    """Counts over all train groups of a prompt that were ever accepted."""

    prompt_id: str
    seen: int
    """Trajectories."""
    solved: int
    """Of these, with a reward of at least `solved_reward`."""
    reward_mean: float
    last_version: PolicyVersion | None
    """Newest version that drew tokens for it; None when only others' weights did."""


class PromptPage(Record):
    """Some prompts, in the order of their ids."""

    prompts: list[PromptStats]
    next_cursor: str | None
    """Ask with it for what follows; None at the end."""


class PromptCounts(NamedTuple):
    """What one group, or all groups of a prompt so far, add up to."""

    seen: int
    solved: int
    reward_sum: float
    last_version: PolicyVersion | None

    def plus(self, other: "PromptCounts") -> "PromptCounts":
        """Return the sum; the version is the newer one."""
        versions = [version for version in (self.last_version, other.last_version) if version is not None]
        return PromptCounts(
            self.seen + other.seen,
            self.solved + other.solved,
            self.reward_sum + other.reward_sum,
            max(versions, default=None),
        )

    def stats(self, prompt_id: str) -> PromptStats:
        """Return the record of a prompt with these counts."""
        return PromptStats(
            prompt_id=prompt_id,
            seen=self.seen,
            solved=self.solved,
            reward_mean=self.reward_sum / self.seen,
            last_version=self.last_version,
        )


def counts_of(group: Group, *, solved_reward: float) -> PromptCounts:
    """Return what a group adds to the counts of its prompt."""
    rewards = [trajectory.reward for trajectory in group.trajectories]
    solved = sum(reward >= solved_reward for reward in rewards)
    return PromptCounts(len(rewards), solved, sum(rewards), group.newest_version)


def check_page(limit: int) -> None:
    """Raise InvalidRequest for a page of no or too many records."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit={limit} is not in [1, {MAX_PAGE}]", hint="ask for the next page by its cursor")


def prompt_page(prompts: list[PromptStats], limit: int) -> PromptPage:
    """Return a page of the first `limit` of up to limit + 1 prompts: one more than asked for shows that more follow."""
    shown = prompts[:limit]
    return PromptPage(prompts=shown, next_cursor=shown[-1].prompt_id if len(prompts) > limit else None)


class MemoryPrompts:
    """The counts per prompt of a MemoryTable; the prompt that got no group for longest is forgotten first."""

    def __init__(self, max_prompts: int) -> None:
        self._max_prompts = max_prompts
        self._counts: dict[str, PromptCounts] = {}  # in the order of their last group
        self._ids: list[str] = []  # ascending
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._counts)

    def count(self, prompt_id: str, added: PromptCounts) -> PromptCounts:
        """Add a group and return the new counts of its prompt."""
        known = self._counts.pop(prompt_id, None)
        if known is None:
            insort(self._ids, prompt_id)
        counts = added if known is None else known.plus(added)
        self._counts[prompt_id] = counts
        if len(self._counts) > self._max_prompts:
            oldest = next(iter(self._counts))
            del self._counts[oldest]
            self._ids.remove(oldest)
            self.forgotten += 1
        return counts

    def page(self, cursor: str, limit: int) -> PromptPage:
        """Return up to `limit` prompts whose ids come after `cursor`."""
        start = bisect_right(self._ids, cursor)
        return prompt_page([self._counts[i].stats(i) for i in self._ids[start : start + limit + 1]], limit)
