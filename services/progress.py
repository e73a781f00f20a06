"""Live progress of a run: snapshots of /v1/stats and the screen that shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_NOT_YET = "none yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What /v1/stats said at one moment of a run."""

    seconds: float
    """Since the run began."""
    updates: int
    version: int
    rollouts: int
    """Train trajectories ever accepted."""
    stored_groups: int
    reuse_mean: float
    """Times a group was handed out, on average over the groups that were handed out at all."""
    metrics: Mapping[str, float]
    """The learner's last posted metrics."""
    waits: Sequence[str]
    """Who waits, for how long, why."""
    actors: Sequence[str]
    """State and version of each actor."""
    outcomes: Mapping[str, int]

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any], *, seconds: float) -> "Snapshot":
        """Read the answer of GET /v1/stats."""
        table, learner = stats["table"], stats["learner"] or {}
        return cls(
            seconds=seconds,
            updates=learner.get("updates", 0),
            version=table["latest_version"],
            rollouts=table["num_trajectories_total"],
            stored_groups=table["num_groups"],
            reuse_mean=table["reuse_mean"],
            metrics=learner.get("metrics", {}),
            waits=[f"{wait['who']} for {wait['since_s']:.0f} s: {wait['reason']}" for wait in table["waits"]],
            actors=[f"{actor['actor_id']} v{actor['version']} {actor['state']}" for actor in stats["actors"]],
            outcomes=table["outcomes"],
        )


def rate(history: Sequence[Snapshot], field: str, *, window_s: float = 5.0) -> float:
    """Return the growth per second of a counter over the last `window_s` of the history."""
    if len(history) < 2:
        return 0.0
    last = history[-1]
    first = next(snapshot for snapshot in history if snapshot.seconds >= last.seconds - window_s)
    elapsed = last.seconds - first.seconds
    return (getattr(last, field) - getattr(first, field)) / elapsed if elapsed else 0.0


def screen(history: Sequence[Snapshot], *, title: str, total_updates: int, events: Sequence[str]) -> RenderableType:
    """Render the newest snapshot: reward, age, reuse, rates, version, who waits."""
    now = history[-1]
    table = Table.grid(padding=(0, 3))
    metric = now.metrics
    reward, age, old = (metric.get(name) for name in ("reward/mean", "age/updates_p50", "age/updates_p90"))
    rows = (
        ("reward", _NOT_YET if reward is None else f"{reward:.3f}", "updates", f"{now.updates} of {total_updates}"),
        (
            "age of the data",
            _NOT_YET if age is None or old is None else f"{age:.0f} updates (p90 {old:.0f})",
            "updates/s",
            f"{rate(history, 'updates'):.1f}",
        ),
        (
            "reuse",
            f"{now.reuse_mean:.2f} times" if now.reuse_mean else _NOT_YET,
            "rollouts/s",
            f"{rate(history, 'rollouts'):.0f}",
        ),
        (
            "weight version",
            _NOT_YET if now.version < 0 else str(now.version),
            "rollouts",
            f"{now.rollouts:,} ({now.stored_groups} groups stored)",
        ),
        ("waits", "; ".join(now.waits) or "nobody", "actors", ", ".join(now.actors) or "starting"),
    )
    for left, value, right, other in rows:
        table.add_row(Text(left, style="dim"), value, Text(right, style="dim"), other)
    bar = ProgressBar(total=total_updates, completed=min(now.updates, total_updates), width=60)
    notes = [Text(event, style="yellow") for event in events[-3:]]
    return Stack(Text(f"{title}   {now.seconds:.0f} s", style="bold"), table, bar, *notes)
