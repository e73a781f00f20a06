"""The whole loop as separate processes: accuracy rises far, and the data that taught it was old."""

import json
from pathlib import Path
from statistics import median

import pytest

from tests.e2e.demo_process import demo_process

UPDATES = 120


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_held_out_accuracy_doubles_from_data_that_is_16_updates_old(tmp_path: Path) -> None:
    with demo_process(tmp_path, {"learner.total_updates": UPDATES}) as demo:
        summary = demo.finish(timeout_s=360)

        lines = (demo.directory / "learner" / "metrics.jsonl").read_text().splitlines()
        ages = [json.loads(line)["age/updates_p50"] for line in lines]
        files = {path.name for path in demo.directory.iterdir()}
    assert summary.accuracy_before <= 0.25
    assert summary.accuracy_after >= 0.6
    assert summary.age_updates_p50 >= 16
    assert median(ages) == summary.age_updates_p50
    assert summary.updates == UPDATES == len(ages)
    assert summary.rollouts == 8 * summary.groups_by_outcome["accepted"]
    assert summary.restarts == 0
    assert {"summary.json", "table.txt", "plot.png"} <= files
