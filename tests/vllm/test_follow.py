"""The agent of docs/vllm.md, on a real server that the real `stalewise act --follow-only` keeps up to date."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from actor.settings import VllmSettings
from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.types import Group, Split, Trajectory
from tests.actor.publishing import publish, wait_until
from tests.factories import RUN_ID
from tests.vllm.conftest import END_IDS, cli, make_policies, options_of, replay_service, started, vllm_server

pytestmark = pytest.mark.vllm

PAGE = Path(__file__).parents[2] / "docs/vllm.md"
PROMPT = [2, 11, 7]
SAID = [3, 4]


def agent_of_the_page(url: str) -> dict[str, Any]:
    """Return what the example of the page defines, for another server."""
    found = re.search(r"<!-- test:agent -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1].replace("http://127.0.0.1:8100", url), names)
    return names


def label(server: httpx.Client) -> str:
    """Return what a server calls its weights."""
    try:
        return str(server.get("/weight_info").json()["weight_version"])
    except httpx.ConnectError:
        time.sleep(0.5)  # it comes up in a minute, and needs the core
        return "not up yet"


def relabel(server: httpx.Client, version: str) -> None:
    """Let a server call its weights otherwise."""
    server.post("/update_weight_version", json={"new_version": version}).raise_for_status()


def two_turns() -> Callable[[list[int]], list[int] | None]:
    """Return a tool that answers once."""
    answers = iter([SAID, None])
    return lambda turn: next(answers)


def test_the_agent_of_the_page_draws_from_the_newest_version_and_its_group_is_accepted(tmp_path: Path) -> None:
    policies = make_policies((tmp_path / "policy0", tmp_path / "policy1"), tied=True)
    model_dir, vllm = policies.directories[0], VllmSettings(dtype="float32")
    with ExitStack() as stack:
        url = stack.enter_context(replay_service(tmp_path, model_dir, {"limiter.error_buffer": 1e6}))
        client = ServiceClient(url, settings=ClientSettings())
        stack.callback(client.close)
        store = HttpWeightStore(client)
        publish(store, model_dir, policies.file(0), 0)
        served = stack.enter_context(vllm_server(tmp_path, model_dir, vllm))
        agent = agent_of_the_page(str(served.url))
        server: httpx.Client = agent["vllm"]
        stack.callback(server.close)

        def episode(number: int) -> Trajectory:
            limits = {"max_tokens": 12, "end_ids": list(END_IDS)}
            drawn: Trajectory = agent["episode"](f"t-{number}", PROMPT, two_turns(), len, **limits)
            return drawn

        run = {"run.name": RUN_ID, "run.runs_dir": tmp_path, "run.model": model_dir, "actor.poll_s": 1.0}
        follow = options_of({**run, "actor.engine": "vllm", "actor.vllm.url": served.url})
        with started(cli(Path(sys.executable), "act", "--follow-only", *follow), tmp_path / "actor.log"):
            wait_until(lambda: label(server) == "0", timeout_s=400)
            before = [episode(number) for number in range(4)]
            publish(store, model_dir, policies.file(1), 1)
            wait_until(lambda: label(server) == "1", timeout_s=60)
            after = [episode(number) for number in range(4, 8)]
            wait_until(lambda: [actor["state"] for actor in client.stats()["actors"]] == ["following"], timeout_s=60)
            relabel(server, "default")  # as after a restart
            wait_until(lambda: label(server) == "1", timeout_s=60)
        group = Group(run_id=RUN_ID, group_id="g", prompt_id="p", split=Split.TRAIN, trajectories=(*before, *after))
        (result,) = HttpTable(client).insert([group])

    assert result.outcome == "accepted"
    assert [{span.version for span in drawn.spans} for drawn in (*before, *after)] == [{0}] * 4 + [{1}] * 4
    for drawn in (*before, *after):
        trained = drawn.response_mask
        assert drawn.response_ids[~trained].tolist() == SAID
        expected = policies.recompute(drawn.prompt_ids, drawn, 1.0)
        assert np.abs(drawn.behavior_logprobs - expected)[trained].max() < 1e-4
