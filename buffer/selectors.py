"""Which groups come next: selectors as records, so that a request, a recipe and a log can all name one."""

import math
import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from buffer.types import Record


class Fifo(Record):
    """Oldest insert first, whether or not it was handed out before."""

    kind: Literal["fifo"] = "fifo"


class Uniform(Record):
    """Every sampleable group alike, without replacement within a draw."""

    kind: Literal["uniform"] = "uniform"


class Fresh(Record):
    """Only groups that were never handed out, oldest first."""

    kind: Literal["fresh"] = "fresh"


class Mix(Record):
    """A share of fresh groups, the rest by another selector; ids within a draw are distinct."""

    kind: Literal["mix"] = "mix"
    fresh: Annotated[float, Field(gt=0, lt=1)]
    """Share of the draw that must never have been handed out, rounded to whole groups, at least one."""
    rest: Fifo | Uniform = Uniform()


Selector = Annotated[Fifo | Uniform | Fresh | Mix, Field(discriminator="kind")]


def num_fresh(selector: Selector, num_groups: int) -> int:
    """Return how many groups of a draw must never have been handed out."""
    match selector:
        case Fresh():
            return num_groups
        case Mix(fresh=share):
            return max(1, math.floor(share * num_groups + 0.5))
        case _:
            return 0


def draw_lots(selector: Selector, num_groups: int, rng: random.Random) -> list[float]:
    """Return the uniform numbers in [0, 1) that a draw needs: one per group chosen by lot."""
    rest = selector.rest if isinstance(selector, Mix) else selector
    num_lots = num_groups - num_fresh(selector, num_groups) if isinstance(rest, Uniform) else 0
    return [rng.random() for _ in range(num_lots)]


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
