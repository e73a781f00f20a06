"""The committed results: one JSON line a run, found again by everything that the run depends on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.simulation import GRAD_CLIP_NORM, Result, Run
from learner.objectives.recipes import recipe_named


def key_of(run: Run) -> str:
    """Return the identity of a run: its settings, the recipe's defaults of today among them."""
    text = json.dumps(_resolved(run), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _resolved(run: Run) -> dict[str, Any]:
    """Return the settings with every option of the recipe, for its defaults may change later.

    The usual clip is left out: most results are older than the setting.
    """
    options = recipe_named(run.objective).model_validate(dict(run.options)).model_dump(mode="json")
    resolved = asdict(run) | {"options": options}
    if run.grad_clip_norm == GRAD_CLIP_NORM:
        del resolved["grad_clip_norm"]
    return resolved


class Results:
    """A JSONL file, read once and appended to; a line appears whole, when its run is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self._records: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}

    def __len__(self) -> int:
        return len(self._records)

    def record(self, run: Run) -> dict[str, Any] | None:
        """Return what is known of a run."""
        return self._records.get(key_of(run))

    def final(self, run: Run) -> float | None:
        """Return its final accuracy; see plan.Finals."""
        record = self.record(run)
        return None if record is None else float(record["result"]["final"])

    def add(self, run: Run, result: Result, *, commit: str) -> None:
        """Append a finished run."""
        key = key_of(run)
        record = {"key": key, "commit": commit, "run": _resolved(run), "result": asdict(result)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records[key] = record
