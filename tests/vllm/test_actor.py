"""The real `stalewise act --engine vllm`, against the real `stalewise serve` from the default environment."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.selectors import Fresh
from buffer.table import SampleRequest
from buffer.types import Sample
from services.address import read_address
from tests.actor.publishing import publish, wait_until
from tests.factories import RUN_ID
from tests.vllm.conftest import make_policies

pytestmark = pytest.mark.vllm

SERVICE_PYTHON = Path(__file__).parents[2] / ".venv/bin/python"
TOLERANCE_NATS = 1e-4
DRAW = 4


@contextmanager
def started(python: Path, log_path: Path, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a command in the background; at the end it is asked to drain."""
    with log_path.open("wb") as log:
        process = subprocess.Popen([python, "-m", "services.cli", *arguments], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, log_path.read_text()


def draw_each_once(table: HttpTable) -> Iterator[Sample]:
    """Yield stored groups, oldest first, but for a rest smaller than a draw."""
    for number in itertools.count():
        request = SampleRequest(num_groups=DRAW, learner_version=1, request_id=f"draw{number}", selector=Fresh())
        samples = table.sample(request)
        if not samples:
            return
        yield from samples


def test_its_groups_are_accepted_and_follow_the_published_versions(tmp_path: Path) -> None:
    policies = make_policies((tmp_path / "policy0", tmp_path / "policy1"), tied=True)
    settings = {
        "run.name": RUN_ID,
        "run.runs_dir": tmp_path,
        "run.model": tmp_path / "policy0",
        "service.port": 0,
        "limiter.error_buffer": 1e6,
        "limiter.min_size": DRAW,
        "learner.groups_per_update": DRAW,
        "actor.task.options.num_digits": 4,
        "actor.group_size": 4,
        "actor.groups_per_batch": 2,
        "actor.vllm.dtype": "float32",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    with started(SERVICE_PYTHON, tmp_path / "service.log", "serve", *options):
        wait_until(lambda: read_address(tmp_path / RUN_ID) is not None, timeout_s=60)
        url = read_address(tmp_path / RUN_ID)
        assert url is not None
        client = ServiceClient(url, settings=ClientSettings())
        table, store = HttpTable(client), HttpWeightStore(client)
        publish(store, tmp_path / "policy0", policies.file(0), 0)
        with started(Path(sys.executable), tmp_path / "actor.log", "act", "--engine", "vllm", *options):
            wait_until(lambda: table.stats().stored_versions.get(0, 0) >= DRAW, timeout_s=180)
            publish(store, tmp_path / "policy0", policies.file(1), 1)
            wait_until(lambda: table.stats().stored_versions.get(1, 0) >= DRAW, timeout_s=60)
        outcomes = table.stats().outcomes
        samples = list(draw_each_once(table))
        client.close()

    assert set(outcomes) <= {"accepted", "full"}
    assert {sample.group.oldest_version for sample in samples} == {0, 1}
    for sample in samples:
        for trajectory in sample.group.trajectories:
            expected = policies.recompute(trajectory.prompt_ids, trajectory, trajectory.sampling.temperature)
            assert np.abs(trajectory.behavior_logprobs - expected).max() < TOLERANCE_NATS
