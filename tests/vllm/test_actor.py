"""The real `stalewise act --engine vllm`, against the real `stalewise serve` from the default environment."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from actor.settings import VllmSettings
from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.selectors import Fresh
from buffer.table import SampleRequest
from buffer.types import FinishReason, Sample
from tests.actor.publishing import publish, wait_until
from tests.factories import RUN_ID
from tests.vllm.conftest import cli, make_policies, options_of, replay_service, started, vllm_server

pytestmark = pytest.mark.vllm

TOLERANCE_NATS = 1e-4
DRAW = 4


def draw_each_once(table: HttpTable) -> Iterator[Sample]:
    """Yield stored groups, oldest first, but for a rest smaller than a draw."""
    for number in itertools.count():
        request = SampleRequest(num_groups=DRAW, learner_version=1, request_id=f"draw{number}", selector=Fresh())
        samples = table.sample(request)
        if not samples:
            return
        yield from samples


@pytest.mark.parametrize("mode", ["in process", "remote"])
def test_its_groups_are_accepted_and_follow_the_published_versions(tmp_path: Path, mode: str) -> None:
    policies = make_policies((tmp_path / "policy0", tmp_path / "policy1"), tied=True)
    settings = {
        "limiter.error_buffer": 1e6,
        "limiter.min_size": DRAW,
        "learner.groups_per_update": DRAW,
        "actor.task.options.num_digits": 4,
        "actor.group_size": 4,
        "actor.groups_per_batch": 2,
        "actor.batches_in_flight": 3,
        "actor.vllm.dtype": "float32",
    }

    with ExitStack() as stack:
        url = stack.enter_context(replay_service(tmp_path, tmp_path / "policy0", settings))
        client = ServiceClient(url, settings=ClientSettings())
        stack.callback(client.close)
        table, store = HttpTable(client), HttpWeightStore(client)
        publish(store, tmp_path / "policy0", policies.file(0), 0)
        if mode == "remote":
            served = stack.enter_context(vllm_server(tmp_path, tmp_path / "policy0", VllmSettings(dtype="float32")))
            settings["actor.vllm.url"] = served.url
        run = {"run.name": RUN_ID, "run.runs_dir": tmp_path, "run.model": tmp_path / "policy0"}
        act = cli(Path(sys.executable), "act", "--engine", "vllm", *options_of(run | settings))
        with started(act, tmp_path / "actor.log"):
            wait_until(lambda: table.stats().stored_versions.get(0, 0) >= DRAW, timeout_s=400)
            publish(store, tmp_path / "policy0", policies.file(1), 1)
            wait_until(lambda: table.stats().stored_versions.get(1, 0) >= DRAW, timeout_s=120)
        outcomes = table.stats().outcomes
        samples = list(draw_each_once(table))

    assert set(outcomes) <= {"accepted", "full"}
    assert {sample.group.oldest_version for sample in samples} == {0, 1}
    for sample in samples:
        for trajectory in sample.group.trajectories:
            assert trajectory.finish_reason is not FinishReason.ABORT
            expected = policies.recompute(trajectory.prompt_ids, trajectory, trajectory.sampling.temperature)
            assert np.abs(trajectory.behavior_logprobs - expected).max() < TOLERANCE_NATS
