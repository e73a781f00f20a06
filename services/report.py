"""What a finished run leaves behind: summary.json, a table and a plot in its directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import BaseModel
from rich.table import Table

from buffer.errors import StalewiseError
from learner.lines import read_lines
from services.progress import Snapshot


class NothingTrained(StalewiseError):
    """A run ended without a single update, so there is nothing to report."""


class Summary(BaseModel):
    """The result of a run, as written to summary.json."""

    run_id: str
    accuracy_before: float
    """Exact match at temperature 1 on the held-out prompts under version 0."""
    accuracy_after: float
    """The same under the last published version."""
    held_out_prompts: int
    seconds: float
    """From the start of the first process to the last update, evaluation excluded."""
    rollouts: int
    """Train trajectories accepted."""
    updates: int
    age_updates_p50: float
    """Median age of a batch when it was consumed, in learner updates; the median over all updates."""
    age_updates_p90: float
    """The 90th percentile of a batch's ages; the median over all updates."""
    reuse_mean: float
    """Times a group was handed out, on average over the groups that were handed out at all."""
    rollouts_per_s: float
    updates_per_s: float
    restarts: int
    """Processes that died and were started again."""
    groups_by_outcome: dict[str, int]
    settings: dict[str, Any]
    """The resolved settings."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the learner's metrics.jsonl, one record an update: the last one where a resumed run did an update again.

    A line that a crash cut off is left out. Raises NothingTrained when there is no update.
    """
    by_update: dict[float, dict[str, float]] = {record["updates"]: record for record in read_lines(path, json.loads)}
    if not by_update:
        raise NothingTrained(f"{path} has no update", hint="see the logs beside it")
    return [by_update[update] for update in sorted(by_update)]


def result_table(summary: Summary) -> Table:
    """Render the summary for the terminal and for table.txt."""
    table = Table(title=summary.run_id, show_header=False)
    rows = {
        "accuracy before": f"{summary.accuracy_before:.1%} of {summary.held_out_prompts} held-out prompts",
        "accuracy after": f"{summary.accuracy_after:.1%}",
        "age of trained data": f"{summary.age_updates_p50:.0f} updates (median), {summary.age_updates_p90:.0f} (p90)",
        "reuse": f"{summary.reuse_mean:.2f} times",
        "updates": f"{summary.updates} ({summary.updates_per_s:.1f}/s)",
        "rollouts": f"{summary.rollouts:,} ({summary.rollouts_per_s:.0f}/s)",
        "groups by outcome": ", ".join(f"{name} {count}" for name, count in summary.groups_by_outcome.items() if count),
        "seconds": f"{summary.seconds:.0f}",
        "processes restarted": str(summary.restarts),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def plot(path: Path, metrics: Sequence[Mapping[str, float]], history: Sequence[Snapshot], summary: Summary) -> None:
    """Draw reward and age by update, and the rates by second."""
    figure = Figure(figsize=(8, 9), layout="constrained")
    reward, age, rates = figure.subplots(3, 1)
    updates = [record["updates"] for record in metrics]
    reward.plot(updates, [record["reward/mean"] for record in metrics], linewidth=0.8, label="reward of trained data")
    ends = (summary.accuracy_before, summary.accuracy_after)
    reward.plot((0, summary.updates), ends, "o", label="held-out accuracy before, after")
    reward.set(xlabel="update", ylabel="share right", ylim=(0, 1), title=f"{summary.run_id}: learning from old data")
    reward.legend(loc="lower right")
    age.plot(updates, [record["age/updates_p50"] for record in metrics], label="median")
    age.plot(updates, [record["age/updates_p90"] for record in metrics], label="p90")
    age.set(xlabel="update", ylabel="age of trained data (updates)")
    age.legend(loc="lower right")
    seconds = [snapshot.seconds for snapshot in history]
    rates.plot(seconds, [snapshot.rollouts for snapshot in history], label="rollouts")
    rates.set(xlabel="second", ylabel="rollouts accepted")
    twin = rates.twinx()
    twin.plot(seconds, [snapshot.updates for snapshot in history], "C1", label="updates")
    twin.set(ylabel="learner updates")
    rates.legend(handles=[*rates.lines, *twin.lines], loc="lower right")
    figure.savefig(path, dpi=110)
