"""When: the samples-per-insert limiter on both sides, and the refusal of settings that could deadlock."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from buffer.errors import InvalidRequest, InvalidSettings
from buffer.selectors import Selector, num_fresh
from buffer.settings import Settings
from buffer.table import SampleRequest, TableSettings


class RateLimiterSettings(Settings):
    """Pacing: the error, inserts x samples_per_insert - samples, stays within error_buffer of its value at min_size.

    The definition is Reverb's SampleToInsertRatio (reverb/rate_limiters.py, arXiv 2102.04736).
    """

    samples_per_insert: Annotated[float, Field(gt=0)] = 1.0
    """How often a group is handed out over its life, on average; higher reuses more and ages more."""
    min_size: Annotated[int, Field(ge=1)] = 16
    """Sampleable groups before the first draw; at least one draw, learner.groups_per_update. With fifo it sets the age
    of the data."""
    error_buffer: Annotated[float, Field(gt=0)] = 64.0
    """Slack of the limiter in draws of one group: larger lets both sides run further apart."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        smallest = 2 * max(1.0, self.samples_per_insert)
        if self.error_buffer < smallest:
            raise ValueError(
                f"error_buffer={self.error_buffer:g} must be at least {smallest:g} (2 x max(1, samples_per_insert)): "
                "smaller values can block insert and sample for ever"
            )
        return self


class Pace(NamedTuple):
    """What the limiter looks at. Both tables keep these numbers; redis_table computes the rules below in Lua."""

    sampleable: int
    """Stored train groups."""
    fresh: int
    """Of these, never handed out."""
    inserted: int
    """Train groups accepted, without those that the age gate or the TTL removed before anybody used them."""
    sampled: int
    """Groups handed out."""
    wanted_fresh: int = 0
    """Fresh groups that would let the last refused draw go on; 0 once a draw went through."""
    no_room: bool = False
    """An insert was refused for lack of room, and nothing was handed out or stored since."""


def limiter_error(limiter: RateLimiterSettings, pace: Pace) -> float:
    """Return how far inserts are ahead of samples, in draws of one group."""
    return pace.inserted * limiter.samples_per_insert - pace.sampled


def reuse_mean(pace: Pace) -> float:
    """Return how often a group was handed out, on average over those that were handed out at all; 0 before that."""
    num_used = pace.inserted - pace.fresh
    return pace.sampled / num_used if num_used else 0.0


def insert_ceiling(limiter: RateLimiterSettings) -> float:
    """Return the limiter_error that an insert may lead to at most."""
    return limiter.min_size * limiter.samples_per_insert + limiter.error_buffer


def may_insert(limiter: RateLimiterSettings, pace: Pace) -> bool:
    """Return whether one more group may come in.

    Always while the learner lacks groups (min_size) or fresh groups (wanted_fresh), since only an insert can help it;
    else while the inserts are at most error_buffer ahead.
    """
    if pace.sampleable < limiter.min_size or pace.fresh < pace.wanted_fresh:
        return True
    return limiter_error(limiter, pace) + limiter.samples_per_insert <= insert_ceiling(limiter)


def draw_blocked(
    limiter: RateLimiterSettings, pace: Pace, num_groups: int, num_fresh: int, *, num_eligible: int
) -> str:
    """Return why a draw must wait: `min_size`, `ahead`, `fresh`, `weight`, or `no_fit` for ever; empty: it may go on.

    num_eligible counts the groups that its selector may choose now. A full table (no_room) waives min_size and the
    pace, since only a draw can help the actors then.
    """
    short = "fresh" if pace.sampleable < num_groups or pace.fresh < num_fresh else ""
    short = short or ("weight" if num_eligible < num_groups else "")
    if pace.no_room:
        return "no_fit" if short else ""
    if pace.sampleable < limiter.min_size:
        return "min_size"
    behind = limiter_error(limiter, pace) - num_groups
    if behind < limiter.min_size * limiter.samples_per_insert - limiter.error_buffer:
        return "ahead"
    return short


def fresh_needed(pace: Pace, num_groups: int, num_fresh: int, *, num_eligible: int) -> int:
    """Return how many fresh groups let a draw go on that is short of groups: a fresh group is always eligible."""
    return max(num_fresh, pace.fresh + num_groups - num_eligible)


def check_settings(table: TableSettings, limiter: RateLimiterSettings) -> None:
    """Raise InvalidSettings for two sections that could block a run for ever together."""
    if limiter.min_size > table.capacity_groups:
        raise InvalidSettings(
            f"limiter.min_size={limiter.min_size} is above table.capacity_groups={table.capacity_groups}: "
            "the first draw would never come",
            hint="raise capacity_groups or lower min_size",
        )
    if table.reuse_limit is not None and table.reuse_limit < limiter.samples_per_insert:
        raise InvalidSettings(
            f"table.reuse_limit={table.reuse_limit} is below "
            f"limiter.samples_per_insert={limiter.samples_per_insert:g}: "
            "groups would leave before they were handed out often enough, and inserts would block",
            hint="raise reuse_limit to at least samples_per_insert",
        )


def check_request(request: SampleRequest, limiter: RateLimiterSettings) -> None:
    """Raise InvalidRequest for a draw that these settings could never serve."""
    check_draw(request.num_groups, request.selector, limiter)


def check_draw(num_groups: int, selector: Selector, limiter: RateLimiterSettings) -> None:
    """Raise InvalidRequest for a draw of `num_groups` by `selector` that these settings could never serve."""
    spi = limiter.samples_per_insert
    if num_groups > limiter.min_size:
        raise InvalidRequest(
            f"num_groups={num_groups} is above limiter.min_size={limiter.min_size}: "
            "the table need not ever hold that many groups",
            hint=f"raise min_size to at least {num_groups}",
        )
    if num_groups + spi > 2 * limiter.error_buffer:
        raise InvalidRequest(
            f"num_groups={num_groups} does not fit error_buffer={limiter.error_buffer:g}: "
            "insert and sample could block each other",
            hint=f"raise error_buffer to at least {(num_groups + spi) / 2:g}",
        )


def check_fresh_share(num_groups: int, selectors: Sequence[Selector], limiter: RateLimiterSettings) -> None:
    """Raise InvalidSettings for a learner whose draws, by these selectors in turn, want more fresh groups than come in.

    Such a draw would not wait for ever, since inserts are let in for it, but nothing would pace the inserts any more.
    """
    share = sum(num_fresh(selector, num_groups) for selector in selectors) / (num_groups * len(selectors))
    spi = limiter.samples_per_insert
    if share * spi > 1 + 1e-9:
        raise InvalidSettings(
            f"{share:.0%} of what the learner draws must be fresh, but with limiter.samples_per_insert={spi:g} only "
            f"{1 / spi:.0%} can be",
            hint=f"lower it to {1 / share:.4g}, or draw fewer fresh groups: more learner.replay_updates, or a `mix`",
        )
