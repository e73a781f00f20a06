"""Looking through a table: pages of summaries in the order of insertion, always along an index, never a scan."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from buffer.types import Identifier, PolicyVersion, Record, Split


class GroupQuery(Record):
    """One page of stored groups, newest first. Each of the three filters has an index; at most one of them."""

    cursor: Annotated[str, Field(pattern=r"^[0-9]{1,16}$")] | None = None
    """The cursor of the page before; None = the first page."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Groups of a page at most."""
    oldest_first: bool = False
    split: Annotated[Split, Field(strict=False)] | None = None
    """Only groups of this split."""
    prompt_id: Identifier | None = None
    """Only groups of this prompt."""
    unused: bool = False
    """Only train groups that were never handed out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.split is not None) + (self.prompt_id is not None) + self.unused > 1:
            raise ValueError("split, prompt_id and unused each have an index, a mixture has none: give one of them")
        return self


class GroupSummary(Record):
    """A stored group without its tokens."""

    sequence: int
    """Number in the order of insertion."""
    group_id: Identifier
    prompt_id: Identifier
    split: Annotated[Split, Field(strict=False)]
    inserted_s: float
    """Unix time of the insert."""
    oldest_version: PolicyVersion | None
    """None for data not drawn by this run's weights."""
    age_updates: int | None
    """Latest published version - oldest version."""
    times_sampled: int
    num_trajectories: int
    num_response_tokens: int
    bytes: int
    """Encoded size."""
    mean_reward: float
    """Mean over the trajectories."""


class GroupPage(Record):
    """Summaries in the order asked for."""

    groups: list[GroupSummary]
    cursor: str | None
    """Ask for the next page with it; None = there is none. It stays good whatever is inserted or removed meanwhile."""
