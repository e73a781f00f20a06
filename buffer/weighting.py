"""What a weighted draw goes by: a choice of the table, since its index keeps the clocks of one weighting.

Priorities come from a learner or an agent of one's own, by POST /v1/priorities: `stalewise learn` posts none.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from buffer.errors import InvalidRequest
from buffer.settings import Settings

WeightedBy = Literal["priority", "recency", "difficulty", "rank"]

MAX_PRIORITY = 1e18
"""Largest priority: with the largest exponent its weight is far inside float64."""

_SMALLEST_WEIGHT = 1e-250
"""A positive priority never becomes weight 0; an exponential clock over it is still finite."""


class PriorityWeighting(Settings):
    """weight = priority ^ exponent (arXiv 1511.05952); priorities come by update_priorities."""

    by: Literal["priority"] = "priority"
    """By priorities that somebody posts; `stalewise learn` does not, and without them all groups are alike."""
    exponent: Annotated[float, Field(gt=0, le=4)] = 0.6
    """1 = proportional, towards 0 = uniform; 0.6 is the value of arXiv 1511.05952."""


class RecencyWeighting(Settings):
    """weight = 2 ^ (-age / half_life_updates), age by the oldest span; what has no version counts from its arrival."""

    by: Literal["recency"] = "recency"
    """By the age of the data."""
    half_life_updates: Annotated[float, Field(ge=0.01, le=1e9)]
    """Updates by which a group must be younger to be twice as likely."""


class DifficultyWeighting(Settings):
    """weight = 4 p (1 - p) with p = (solved + 1) / (seen + 2) of the group's prompt: middle success rates first.

    A new prompt has weight 1. A prompt always or never solved tends to 0 as 4 / seen and never gets there.
    """

    by: Literal["difficulty"] = "difficulty"
    """By the success rate of the prompt."""


class RankWeighting(Settings):
    """No lots: highest priority - decay_per_use x uses first, ties to the oldest (after Trinity-RFT, 2505.17826)."""

    by: Literal["rank"] = "rank"
    """By priority and reuse, without lots."""
    decay_per_use: Annotated[float, Field(ge=0, le=MAX_PRIORITY)] = 1.0
    """What one use takes off the priority. 1 puts used groups behind all unused ones while nobody posts priorities."""
    cool_down_updates: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    """Updates from one use of a group until rank may choose it again."""


Weighting = Annotated[
    PriorityWeighting | RecencyWeighting | DifficultyWeighting | RankWeighting, Field(discriminator="by")
]


def difficulty(seen: int, solved: int) -> float:
    """Return the weight of a prompt of which `solved` of `seen` trajectories were solved."""
    chance = (solved + 1) / (seen + 2)
    return 4 * chance * (1 - chance)


def checked_priorities(weighting: Weighting | None, priorities: Mapping[str, float]) -> dict[str, float]:
    """Return group_id -> the number that the index keeps. Raises InvalidRequest.

    The number is the weight itself, or the priority where the weighting ranks.
    """
    if not isinstance(weighting, PriorityWeighting | RankWeighting):
        is_now = "not set" if weighting is None else f"{weighting.by!r}"
        raise InvalidRequest(
            f"priorities would change nothing: table.weighting.by is {is_now}", hint="set it to 'priority' or 'rank'"
        )
    for group_id, priority in priorities.items():
        if not 0 <= priority <= MAX_PRIORITY:  # not true of NaN
            raise InvalidRequest(
                f"the priority of {group_id!r} is {priority}", hint=f"priorities lie in [0, {MAX_PRIORITY:g}]"
            )
    if isinstance(weighting, RankWeighting):
        return {group_id: float(priority) for group_id, priority in priorities.items()}
    return {group_id: _weight(priority, weighting.exponent) for group_id, priority in priorities.items()}


def _weight(priority: float, exponent: float) -> float:
    return max(_SMALLEST_WEIGHT, math.pow(priority, exponent)) if priority else 0.0
