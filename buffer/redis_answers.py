"""What the scripts and keys of a table on Redis say, read into our records."""

from collections import Counter
from typing import Any

import msgpack

from buffer.browsing import GroupSummary
from buffer.outcomes import outcome_of
from buffer.prompts import PromptCounts
from buffer.staleness import age_updates
from buffer.types import PolicyVersion, Split
from buffer.waits import Waiting


def prompt_counts(packed: bytes) -> PromptCounts:
    """Read an entry of the hash `prompts`."""
    seen, solved, reward_sum, last_version = msgpack.unpackb(packed)
    return PromptCounts(seen, solved, float(reward_sum), None if last_version == "" else last_version)


def summary_of(entry: list[Any], latest: PolicyVersion) -> GroupSummary:
    """Read one entry of browse.lua."""
    sequence, group_id, prompt_id, split, inserted_s, version, uses, trajectories, tokens, size_bytes, reward_sum = (
        entry
    )
    oldest = int(version) if version else None
    return GroupSummary(
        sequence=int(sequence),
        group_id=group_id.decode(),
        prompt_id=prompt_id.decode(),
        split=Split(split.decode()),
        inserted_s=float(inserted_s),
        oldest_version=oldest,
        age_updates=age_updates(latest, oldest),
        times_sampled=int(uses),
        num_trajectories=int(trajectories),
        num_response_tokens=int(tokens),
        bytes=int(size_bytes),
        mean_reward=float(reward_sum) / int(trajectories),
    )


def outcomes(fields: dict[str, str], prefix: str) -> dict[str, int]:
    """Add up the counters `<prefix><result code>` by outcome."""
    totals: Counter[str] = Counter()
    for name, number in fields.items():
        if name.startswith(prefix):
            totals[outcome_of(name.removeprefix(prefix)).value] += int(number)
    return dict(totals)


def waiting(fields: dict[str, str], who: str) -> Waiting | None:
    """Return the wait of `learner` or `actors`; None when it does not wait."""
    code = fields.get(f"{who}_wait_code")
    if code is None:
        return None
    return Waiting(code, float(fields[f"{who}_wait_since_s"]), float(fields[f"{who}_wait_last_s"]))
