"""Metrics of a run on disk: one JSON object a line, TensorBoard event files, and Weights & Biases if asked."""

import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from buffer.errors import InvalidSettings
from learner.lines import append_lines
from learner.step import Progress

_QUEUED_SCALARS = 4096
"""Of several updates: with the library's 10, each further scalar of an update waits for its writing thread."""


class RunLog:
    """Writes each update's metrics; a resumed run appends, and its JSON lines repeat the updates that it does again."""

    def __init__(self, directory: Path, *, run_name: str, wandb_project: str | None, updates_done: int) -> None:
        self._wandb = None if wandb_project is None else _start_wandb(wandb_project, run_name, directory)
        self._lines = append_lines(directory / "metrics.jsonl")
        self._tensorboard = SummaryWriter(
            str(directory / "tensorboard"), purge_step=updates_done + 1, max_queue=_QUEUED_SCALARS
        )

    def write(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Record one update; a line is on its way to the disk when this returns."""
        line = {"updates": progress.updates, "version": progress.clock, **metrics}
        self._lines.write(json.dumps(line).encode() + b"\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, progress.updates)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=progress.updates)

    def close(self) -> None:
        """Flush and close everything."""
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, run_name: str, directory: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise InvalidSettings(
            f"learner.wandb_project={project!r} but wandb is not installed",
            hint="in the clone: pip install '.[wandb]', or leave the setting out",
        ) from error
    return wandb.init(project=project, name=run_name, id=_wandb_id(directory / "wandb-id"), resume="allow")


def _wandb_id(path: Path) -> str:
    """Return the id of the run's own page there, made once: names are given twice, and may hold what ids must not."""
    if not path.is_file():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
