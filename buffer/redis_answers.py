"""What the scripts and counters of one shard on Redis answer, read as records; common.lua is the key schema."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgpack

from buffer.browsing import GroupSummary
from buffer.outcomes import outcome_of
from buffer.prompts import PromptCounts
from buffer.rate_limiter import Pace, RateLimiterSettings, limiter_error, reuse_mean
from buffer.staleness import age_updates
from buffer.table import TableStats
from buffer.types import PolicyVersion, Split
from buffer.waits import Waiting, report

T = TypeVar("T")

DrawnEntry = tuple[str, int, int | bool, float, int, int]
"""member, uses, age or False, probability, bytes, candidates: what sample.lua says of a drawn group."""

_COUNTERS = ["bytes", "partial_bytes", "tokens", "foreign", "inserted", "sampled", "trajectories"]
_COUNTERS += ["repeat_bytes", "dropped_repeats"]
_COUNTERS += ["forgotten_ids", "forgotten_prompts", "weights_left_behind", "wanted_fresh", "no_room"]
"""Integer fields of the hash `stats`; see common.lua."""

_MOST_IN_A_CHUNK = 256


def chunks_of(items: Sequence[T], *, size: Callable[[T], int], max_bytes: int) -> Iterator[Sequence[T]]:
    """Yield the items in order, in chunks of up to `max_bytes` and 256 items; a larger item is a chunk of its own."""
    start, total = 0, 0
    for end, item in enumerate(items):
        total += size(item)
        if end > start and (total > max_bytes or end - start == _MOST_IN_A_CHUNK):
            yield items[start:end]
            start, total = end, size(item)
    if start < len(items):
        yield items[start:]


def prompt_counts_of(packed: bytes) -> PromptCounts:
    """Read a value of the hash `prompts`."""
    seen, solved, reward_sum, last_version = msgpack.unpackb(packed)
    return PromptCounts(seen, solved, float(reward_sum), None if last_version == "" else last_version)


def summary_of(entry: list[Any], latest: PolicyVersion) -> GroupSummary:
    """Read one entry of browse.lua."""
    member, version, uses, size_bytes, *about = entry
    group_id, _, prompt_id, split, _, tokens, trajectories, reward_sum, inserted_s = about
    oldest = version if version >= 0 else None
    return GroupSummary(
        sequence=int(member),
        group_id=group_id,
        prompt_id=prompt_id,
        split=Split(split),
        inserted_s=float(inserted_s),
        oldest_version=oldest,
        age_updates=age_updates(latest, oldest),
        times_sampled=uses,
        num_trajectories=trajectories,
        num_response_tokens=tokens,
        bytes=size_bytes,
        mean_reward=reward_sum / trajectories,
    )


def stats_of(
    fields: Mapping[str, str],
    versions: Mapping[bytes, bytes],
    uses: Mapping[bytes, bytes],
    sizes: Sequence[int],
    *,
    limiter: RateLimiterSettings,
    now_s: float,
) -> TableStats:
    """Return the statistics that the hash `stats`, the histograms and the sizes of the indexes say."""
    num_train, num_fresh, num_eval, num_open, num_sealed, num_prompts = sizes
    counts = {name: int(fields.get(name, 0)) for name in _COUNTERS}
    removed = {name.removeprefix("removed:"): int(n) for name, n in fields.items() if name.startswith("removed:")}
    unused = removed.get("age_unsampled", 0) + removed.get("ttl_unsampled", 0)
    pace = Pace(
        sampleable=num_train,
        fresh=num_fresh,
        inserted=counts["inserted"] - unused,
        sampled=counts["sampled"],
        wanted_fresh=counts["wanted_fresh"],
        no_room=bool(counts["no_room"]),
    )
    learner, actors = _waiting(fields, "learner"), _waiting(fields, "actors")
    return TableStats(
        num_groups=num_train,
        num_fresh=num_fresh,
        num_eval=num_eval,
        num_foreign=counts["foreign"],
        bytes=counts["bytes"],
        num_response_tokens=counts["tokens"],
        inserted_total=counts["inserted"],
        sampled_total=counts["sampled"],
        reuse_mean=reuse_mean(pace),
        outcomes=_outcomes(fields, "result:"),
        part_outcomes=_outcomes(fields, "part:"),
        num_partial_groups=num_open + num_sealed,
        partial_bytes=counts["partial_bytes"],
        repeat_bytes=counts["repeat_bytes"],
        dropped_repeats_total=counts["dropped_repeats"],
        removed=removed,
        stored_versions={int(version): int(n) for version, n in versions.items()},
        stored_uses={int(times): int(n) for times, n in uses.items()},
        reward_sum=float(fields.get("reward_sum", 0)),
        num_trajectories_total=counts["trajectories"],
        forgotten_ids_total=counts["forgotten_ids"],
        num_prompts=num_prompts,
        forgotten_prompts_total=counts["forgotten_prompts"],
        weights_left_behind_total=counts["weights_left_behind"],
        latest_version=int(fields.get("latest_version", -1)),
        limiter_error=limiter_error(limiter, pace),
        waits=report(learner, actors, limiter=limiter, pace=pace, now_s=now_s),
    )


def _outcomes(fields: Mapping[str, str], prefix: str) -> dict[str, int]:
    outcomes: Counter[str] = Counter()
    for name, number in fields.items():
        if name.startswith(prefix):
            outcomes[outcome_of(name.removeprefix(prefix)).value] += int(number)
    return dict(outcomes)


def _waiting(fields: Mapping[str, str], who: str) -> Waiting | None:
    code = fields.get(f"{who}_wait_code")
    if code is None:
        return None
    return Waiting(code, float(fields[f"{who}_wait_since_s"]), float(fields[f"{who}_wait_last_s"]))
