"""kill -9 of each process in mid-run: the others go on or wait, and the run completes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.demo_process import demo_process

UPDATES = 60
SHORT = {"learner.total_updates": UPDATES, "learner.checkpoint_every": 5, "limiter.min_size": 64}


def _updates(stats: dict[str, Any]) -> int:
    return stats["learner"]["updates"] if stats["learner"] else 0


def _version(stats: dict[str, Any]) -> int:
    version: int = stats["table"]["latest_version"]
    return version


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_a_run_completes_although_each_of_its_processes_is_killed_once(tmp_path: Path) -> None:
    with demo_process(tmp_path, SHORT) as demo:
        demo.wait_until(lambda stats: _updates(stats) >= 6, timeout_s=120)
        os.kill(demo.pid("act"), signal.SIGKILL)
        demo.wait_until(lambda stats: _updates(stats) >= 14, timeout_s=120)
        os.kill(demo.pid("learn"), signal.SIGKILL)
        before = demo.wait_until(lambda stats: _updates(stats) >= 20, timeout_s=120)
        os.kill(demo.pid("serve"), signal.SIGKILL)
        after = demo.wait_until(
            lambda stats: _updates(stats) >= 26 and _version(stats) > _version(before), timeout_s=120
        )

        summary = demo.finish(timeout_s=240)
    assert after["table"]["inserted_total"] >= before["table"]["inserted_total"]
    assert summary.restarts == 3
    assert summary.updates == UPDATES
    assert summary.rollouts == 8 * summary.groups_by_outcome["accepted"]


@pytest.mark.e2e
@pytest.mark.timeout(200)
def test_a_demo_that_is_told_to_stop_leaves_no_process_behind(tmp_path: Path) -> None:
    with demo_process(tmp_path, SHORT) as demo:
        demo.wait_until(lambda stats: _updates(stats) >= 2, timeout_s=120)
        pids = [demo.pid(command) for command in ("serve", "learn", "act")]

        demo.process.terminate()
        demo.process.wait(60)

    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
