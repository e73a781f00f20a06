"""From the learner's new weights to the first token drawn under them: a distribution, from the logs of a real demo.

    python -m benchmarks.first_token --updates 120

Runs `stalewise demo` with its logs as JSON lines and reads what its processes say, all on one machine's clock: the
service when a version is committed, each actor when its canary passed and when it drew its first token. A version that
an actor skipped for a newer one, or drew nothing under, has no such time and is counted.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Delays:
    """Seconds since the learner had each version, of all actors."""

    committed: list[float] = field(default_factory=list)
    proven: list[float] = field(default_factory=list)
    in_mid_generation: list[float] = field(default_factory=list)
    """First tokens of actors that were generating when the version came."""
    of_a_new_batch: list[float] = field(default_factory=list)
    """First tokens of those that were not: they post, score rewards, or wait for admission."""
    without_token: int = 0
    """Loads under which nothing was drawn before the next one, or before the end."""


def run_demo(runs_dir: Path, updates: int) -> Path:
    """Run it and return the directory of its logs."""
    settings = [f"run.runs_dir={runs_dir}", f"learner.total_updates={updates}", "log.format=json"]
    options = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "services.cli", "demo", *options], check=True, stdout=subprocess.DEVNULL)
    (directory,) = runs_dir.glob("*/logs")
    return directory


def read_delays(logs: Path) -> Delays:
    """Return what the logs say; versions that were published before all actors had their first one are left out."""
    delays = Delays()
    committed = {r["version"]: r["unix_s"] for r in records(logs / "service.log") if "is published" in r["message"]}
    had: dict[int, float] = {}
    for path in sorted(logs.glob("actor-*.log")):
        first: dict[int, tuple[float, str]] = {}
        loads: dict[int, float] = {}
        for record in records(path):
            if found := re.match(r"generating with version \d+, ([\d.]+) s after", record["message"]):
                loads[record["version"]] = float(found.group(1))
                had[record["version"]] = record["unix_s"] - float(found.group(1))
            elif found := re.match(r"first token under version \d+, (.*)", record["message"]):
                first[record["version"]] = (record["unix_s"], found.group(1))
        for version, loaded_s in loads.items():
            if version == min(loads):
                continue  # the actor was still starting
            delays.proven.append(loaded_s)
            if version not in first:
                delays.without_token += 1
                continue
            at_s, when = first[version]
            kind = delays.in_mid_generation if when == "in mid-generation" else delays.of_a_new_batch
            kind.append(at_s - had[version])
    delays.committed = [committed[version] - had[version] for version in had if version > min(had)]
    return delays


def records(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the records of a log, with their time as Unix seconds."""
    for line in path.read_text().splitlines():
        if line.startswith("{"):
            record = json.loads(line)
            yield record | {"unix_s": datetime.fromisoformat(record["time"]).timestamp()}


def described(name: str, delays_s: Sequence[float]) -> str:
    """Return one line of percentiles."""
    if not delays_s:
        return f"{name}: none"
    p10, p50, p90, p99 = np.percentile(delays_s, (10, 50, 90, 99)) * 1e3
    return f"{name}, ms: p10 {p10:.0f}, p50 {p50:.0f}, p90 {p90:.0f}, p99 {p99:.0f} (n = {len(delays_s)})"


def main() -> None:
    """Run one demo and print the distributions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=120, help="of the demo's learner, each of them published")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        delays = read_delays(run_demo(Path(directory), arguments.updates))
    print(described("committed", delays.committed))
    print(described("canary passed", delays.proven))
    print(described("first token, in mid-generation", delays.in_mid_generation))
    print(described("first token, of a new batch", delays.of_a_new_batch))
    print(f"loads without a token of their own: {delays.without_token}")


if __name__ == "__main__":
    main()
