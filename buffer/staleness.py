"""How old is too old: the age of data in learner updates, its buckets, and the hard gate on it."""

from bisect import bisect_right

from buffer.types import PolicyVersion

AGE_BUCKETS = {"foreign": -1, "0": 0, "1_3": 1, "4_15": 4, "16_63": 16, "64_plus": 64}
"""Name of an age bucket -> its smallest age, in updates, ascending; `foreign` = not drawn by this run's weights."""

_NAMES, _SMALLEST = list(AGE_BUCKETS), list(AGE_BUCKETS.values())


def age_updates(clock: PolicyVersion, oldest_version: PolicyVersion | None) -> int | None:
    """Return the age of data at the learner's update clock; None for data that this run's weights did not draw."""
    return None if oldest_version is None else clock - oldest_version


def age_bucket(age: int) -> str:
    """Return the name of the bucket of an age of at least 0 updates."""
    return _NAMES[bisect_right(_SMALLEST, age) - 1]


def is_too_old(clock: PolicyVersion, oldest_version: PolicyVersion | None, max_age_updates: int | None) -> bool:
    """Return whether the age gate is closed; it never is for data without a version, or without a gate."""
    age = age_updates(clock, oldest_version)
    return age is not None and max_age_updates is not None and age > max_age_updates
