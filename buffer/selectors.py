"""Which groups come next: selectors as records, so that a request, a recipe and a log can all name one."""

import math
import random
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from buffer.errors import InvalidRequest
from buffer.types import Record
from buffer.weighting import WeightedBy, Weighting


class Fifo(Record):
    """Oldest insert first, whether or not it was handed out before."""

    kind: Literal["fifo"] = "fifo"


class Lifo(Record):
    """Newest insert first, whether or not it was handed out before."""

    kind: Literal["lifo"] = "lifo"


class Uniform(Record):
    """Every sampleable group alike, without replacement within a draw."""

    kind: Literal["uniform"] = "uniform"


class Fresh(Record):
    """Only groups that were never handed out, oldest first."""

    kind: Literal["fresh"] = "fresh"


class Weighted(Record):
    """By the weights of table.weighting, without replacement within a draw."""

    kind: Literal["weighted"] = "weighted"
    by: WeightedBy
    """Must be what table.weighting says: the table keeps the clocks of one weighting."""


class Mix(Record):
    """A share of fresh groups, the rest by another selector; ids within a draw are distinct."""

    kind: Literal["mix"] = "mix"
    fresh: Annotated[float, Field(gt=0, lt=1)]
    """Share of the draw that must never have been handed out, rounded to whole groups, at least one."""
    rest: Annotated[Fifo | Lifo | Uniform | Weighted, Field(discriminator="kind")] = Uniform()


Selector = Annotated[Fifo | Lifo | Uniform | Fresh | Weighted | Mix, Field(discriminator="kind")]


class Choice(NamedTuple):
    """A group that a draw takes from a table in memory, by its sequence number; see SampleInfo."""

    sequence: int
    probability: float = 1.0
    num_candidates: int = 1


def rest_of(selector: Selector) -> Fifo | Lifo | Uniform | Fresh | Weighted:
    """Return what chooses the groups of a draw that need not be fresh."""
    return selector.rest if isinstance(selector, Mix) else selector


def num_fresh(selector: Selector, num_groups: int) -> int:
    """Return how many groups of a draw must never have been handed out."""
    match selector:
        case Fresh():
            return num_groups
        case Mix(fresh=share):
            return max(1, math.floor(share * num_groups + 0.5))
        case _:
            return 0


def check_weighting(selector: Selector, weighting: Weighting | None) -> None:
    """Raise InvalidRequest for a draw by other weights than the table keeps."""
    rest = rest_of(selector)
    if isinstance(rest, Weighted) and (weighting is None or weighting.by != rest.by):
        kept = "not set" if weighting is None else repr(weighting.by)
        raise InvalidRequest(
            f"the draw is weighted by {rest.by!r}, but table.weighting.by is {kept}",
            hint="name the table's weighting, or begin a run with another one",
        )


def draw_lots(selector: Selector, num_groups: int, rng: random.Random) -> list[float]:
    """Return the random numbers that a draw needs.

    Uniform: one in [0, 1) per group chosen by lot. Weighted: one of mean 1, exponential, per clock that may go off.
    """
    match rest_of(selector):
        case Uniform():
            return [rng.random() for _ in range(num_groups - num_fresh(selector, num_groups))]
        case Weighted(by=by) if by != "rank":
            return [rng.expovariate(1.0) for _ in range(num_groups)]
        case _:
            return []


def draw_ranks(taken: Sequence[int], total: int, uniforms: Sequence[float]) -> list[int]:
    """Draw one distinct rank in [0, total) per uniform number in [0, 1), never one of `taken` (ascending).

    A Fisher-Yates shuffle that stores only the swaps: O(taken + drawn), whatever `total` is. The ranks in `taken` are
    swapped to the front, where later swaps do not reach.
    """
    moved: dict[int, int] = {}
    for front, rank in enumerate(taken):
        moved[rank] = moved.get(front, front)
    drawn = []
    for front, uniform in enumerate(uniforms, start=len(taken)):
        other = front + math.floor(uniform * (total - front))
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(front, front)
    return drawn
