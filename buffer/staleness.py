"""How old is too old: the age of data in learner updates, and the hard gate on it."""

from buffer.types import PolicyVersion


def age_updates(clock: PolicyVersion, oldest_version: PolicyVersion | None) -> int | None:
    """Return the age of data at the learner's update clock; None for data that this run's weights did not draw."""
    return None if oldest_version is None else clock - oldest_version


def is_too_old(clock: PolicyVersion, oldest_version: PolicyVersion | None, max_age_updates: int | None) -> bool:
    """Return whether the age gate is closed; it never is for data without a version, or without a gate."""
    age = age_updates(clock, oldest_version)
    return age is not None and max_age_updates is not None and age > max_age_updates
