"""The one sentence for each refusal and each wait, the same whichever table says it."""

from buffer.errors import DrawLost
from buffer.staleness import is_too_old
from buffer.table import TableSettings
from buffer.types import Group, InsertOutcome, PolicyVersion, Split, Trajectory

Facts = tuple[float, ...]
"""The numbers of a refusal, in the order in which its sentence shows them."""

_SENTENCES = {
    "stored": (InsertOutcome.DUPLICATE, "this group was accepted before with the same content; nothing to do"),
    "conflict": (InsertOutcome.CONFLICT, "group_id was used before for other content; give new data a new id"),
    "run": (InsertOutcome.INVALID, "run_id is not the run of this table; ask GET /v1/run and start over"),
    "version": (
        InsertOutcome.INVALID,
        "a span claims version {0:.0f}, the latest published version is {1:.0f}; send the version that drew the tokens",
    ),
    "foreign": (
        InsertOutcome.INVALID,
        "some spans have no version and foreign_share is 0; this run takes no data that its own weights did not draw",
    ),
    "foreign_share": (
        InsertOutcome.FULL,
        "{0:.0f} of {1:.0f} groups are foreign and foreign_share is {2:g}; try again when there is more own data",
    ),
    "stale": (
        InsertOutcome.STALE,
        "the oldest span is of version {0:.0f}, {1:.0f} updates behind, and max_age_updates is {2:.0f}; "
        "load newer weights",
    ),
    "malformed": (InsertOutcome.INVALID, "not a record"),
    "bytes": (InsertOutcome.OVERSIZE, "the encoded group has {0:.0f} bytes, the limit is {1:.0f}; send smaller groups"),
    "pace": (
        InsertOutcome.FULL,
        "inserts are {0:g} draws ahead of the learner and the limiter allows {1:g}; try again after it sampled",
    ),
    "capacity": (
        InsertOutcome.FULL,
        "the table holds {0:.0f} groups and {1:.0f} bytes and may evict too few; try again after the learner sampled",
    ),
    "pending": (
        InsertOutcome.PENDING,
        "{0:.0f} of {1:.0f} trajectories are held; the group is promised when it is complete and accepted",
    ),
    "held": (InsertOutcome.DUPLICATE, "this trajectory was received before with the same content; nothing to do"),
    "trajectory": (
        InsertOutcome.CONFLICT,
        "trajectory_id was used before in this group for other content; give new data a new id",
    ),
    "group_fields": (
        InsertOutcome.CONFLICT,
        "prompt_id, split or group_size is not that of the group's first trajectory; they are the same in every part",
    ),
    "closed": (
        InsertOutcome.GROUP_CLOSED,
        "the group was closed without this trajectory: it was complete, overdue or refused; start a new group",
    ),
    "partials": (
        InsertOutcome.FULL,
        "{0:.0f} partial groups of {1:.0f} bytes are held, the most allowed; complete them, or wait until they expire",
    ),
}

_WAITS = {
    "min_size": "fewer groups are stored than limiter.min_size: waiting for the actors",
    "fresh": "too few groups were never handed out: waiting for the actors",
    "weight": "too few groups may be drawn by weight (weight 0, or cool-down): waiting for the actors",
    "ahead": "samples are ahead of samples_per_insert: waiting for the actors",
    "pace": "inserts are ahead of samples_per_insert: waiting for the learner",
    "capacity": "the table is full of groups that were never handed out: waiting for the learner",
}


def refusal(code: str, facts: Facts = ()) -> tuple[InsertOutcome, str]:
    """Return the outcome and the sentence of a group or part that was not simply accepted."""
    outcome, template = _SENTENCES[code]
    return outcome, template.format(*facts)


def refused_at_sight(group: Group, size_bytes: int, settings: TableSettings, run_id: str) -> tuple[str, Facts] | None:
    """Return the refusal, as code and facts, of a group that no table with these settings takes; None when one may."""
    if group.run_id != run_id:
        return "run", ()
    limit_bytes = min(settings.max_group_bytes, settings.capacity_bytes)
    return ("bytes", (size_bytes, limit_bytes)) if size_bytes > limit_bytes else None


def refused_for_version(
    tokens: Group | Trajectory, split: Split, latest: PolicyVersion, settings: TableSettings
) -> tuple[str, Facts] | None:
    """Return the refusal of what was drawn by unpublished, too old or others' weights; None when it was not."""
    newest, oldest = tokens.newest_version, tokens.oldest_version
    if newest is not None and newest > latest:
        return "version", (newest, latest)
    if split is not Split.TRAIN:
        return None
    if oldest is not None and is_too_old(latest, oldest, settings.max_age_updates):
        return "stale", (oldest, latest - oldest, settings.max_age_updates or 0)
    return ("foreign", ()) if tokens.is_foreign and settings.foreign_share == 0 else None


def outcome_of(code: str) -> InsertOutcome:
    """Return the outcome of a group or part with this result code."""
    return InsertOutcome.ACCEPTED if code == "accepted" else _SENTENCES[code][0]


def wait_reason(code: str) -> str:
    """Return the sentence of a wait."""
    return _WAITS[code]


def no_fit(num_groups: int, num_fresh: int, stored: int, stored_fresh: int, eligible: int) -> str:
    """Return the sentence for a draw that a full table can never serve."""
    return (
        f"the table has no room for more groups and holds {stored} ({stored_fresh} fresh, {eligible} that the selector "
        f"may choose), too few for a draw of {num_groups} ({num_fresh} fresh): raise table.capacity_bytes or draw fewer"
    )


def draw_lost() -> DrawLost:
    """Return what is said to the reader of a draw, or to its repeat, that comes too late."""
    return DrawLost(
        "groups of this draw were removed, and are no longer kept for a reader so late",
        hint="draw under a new request_id; raise table.repeat_max_bytes, or table.repeat_window_s for slow readers",
    )
