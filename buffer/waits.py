"""Who waits for whom, since when: set by each refusal, cleared by the next success."""

from dataclasses import dataclass

from buffer.outcomes import wait_reason
from buffer.rate_limiter import Pace, RateLimiterSettings, may_insert
from buffer.table import Wait

FORGET_AFTER_S = 30.0
"""A side that has not asked for this long has stopped, it does not wait."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One side is refused for the reason `code` of outcomes.py."""

    code: str
    since_s: float
    """When the first of the refusals came, in seconds since 1970."""
    last_s: float
    """When the last one came."""


def refused_again(waiting: Waiting | None, code: str, now_s: float) -> Waiting:
    """Return the wait of a side after one more refusal."""
    if waiting is None or now_s - waiting.last_s > FORGET_AFTER_S:
        return Waiting(code, now_s, now_s)
    return Waiting(code, waiting.since_s, now_s)


def report(
    learner: Waiting | None, actors: Waiting | None, *, limiter: RateLimiterSettings, pace: Pace, now_s: float
) -> list[Wait]:
    """Return the waits that still hold: the other side may have moved since the last refusal."""
    actors_paced = not may_insert(limiter, pace)
    freed = {
        "min_size": pace.no_room or pace.sampleable >= limiter.min_size,
        "fresh": pace.no_room or pace.fresh >= pace.wanted_fresh,
        "weight": pace.no_room or pace.fresh >= pace.wanted_fresh,
        "ahead": pace.no_room or actors_paced,
        "pace": not actors_paced,
        "capacity": not pace.no_room,
    }
    sides = {"learner": learner, "actors": actors}
    return [
        Wait(who=who, since_s=max(0.0, now_s - waiting.since_s), reason=wait_reason(waiting.code))
        for who, waiting in sides.items()
        if waiting is not None and now_s - waiting.last_s <= FORGET_AFTER_S and not freed[waiting.code]
    ]
