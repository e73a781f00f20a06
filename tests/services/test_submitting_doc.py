"""docs/submitting.md is true: its examples are accepted as they stand, its table has every outcome."""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from buffer.client import HttpWeightStore, ServiceClient
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import SampleRequest, TableSettings
from buffer.types import InsertOutcome
from learner.snapshot import take_snapshot
from services.intake_api import STATUS
from tests.factories import PAYLOAD, RUN_ID, make_group, make_manifest
from tests.learner.builders import make_policy, save_tiny_model
from tests.learner.stores import publisher_to
from tests.services.live import make_context, serving

PAGE = (Path(__file__).parents[2] / "docs" / "submitting.md").read_text()
EXAMPLES = re.findall(r"8642(/v1/\w+) [^\n]* -d '(.*?)'\n```", PAGE, re.DOTALL)


def block(name: str) -> str:
    """Return a block of code that the page marks."""
    found = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(("path", "body"), EXAMPLES, ids=[path for path, _ in EXAMPLES])
def test_example_is_taken_as_it_stands(tmp_path: Path, path: str, body: str) -> None:
    table = MemoryTable(TableSettings(), RateLimiterSettings(), "run")
    table.advance_version(0)

    with serving(make_context(tmp_path, table)) as url:
        response = httpx.post(url + path, json=json.loads(body), trust_env=False)

    wanted = {"/v1/groups": (200, "accepted"), "/v1/trajectories": (202, "pending")}
    assert (response.status_code, response.json()["results"][0]["outcome"]) == wanted[path]


def test_page_has_an_example_of_each_route() -> None:
    assert [path for path, _ in EXAMPLES] == ["/v1/groups", "/v1/trajectories"]


def test_an_engine_of_ones_own_follows_the_published_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    policy = make_policy(tmp_path / "model")
    loaded: list[tuple[int, float]] = []
    monkeypatch.chdir(tmp_path)

    with serving(make_context(tmp_path / "service")) as url, closing(ServiceClient(url)) as client:
        publisher = publisher_to(HttpWeightStore(client), run_id=RUN_ID)

        def publish(version: int) -> None:
            with torch.no_grad():
                policy.model.get_parameter("model.norm.weight").fill_(version)
            publisher.begin(take_snapshot(policy, dtype="float32", tolerance_nats=0.05), version=version)
            publisher.flush()

        def load(tensors: dict[str, torch.Tensor], version: int) -> None:
            assert tensors.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
            loaded.append((version, tensors["model.norm.weight"][0].item()))
            if version == 2:
                raise KeyboardInterrupt
            publish(version + 1)

        publish(0)
        names: dict[str, Any] = {"load": load}
        with pytest.raises(KeyboardInterrupt):
            exec(block("follow").replace("http://127.0.0.1:8642", url), names)
        names["client"].close()

    assert loaded == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_groups_that_were_full_are_sent_again_after_the_pause_that_was_asked_for(tmp_path: Path) -> None:
    table = MemoryTable(TableSettings(capacity_groups=1), RateLimiterSettings(min_size=1), RUN_ID)
    table.advance_version(0)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        table.sample(SampleRequest(num_groups=1, learner_version=0, request_id=f"r{len(pauses)}"))  # makes room

    code = block("resubmit").replace("time.sleep(", "sleep(")
    with serving(make_context(tmp_path, table)) as url:
        names: dict[str, Any] = {"groups": [make_group("a"), make_group("b")], "sleep": sleep}
        exec(code.replace("http://127.0.0.1:8642", url), names)
        names["client"].close()

    assert pauses == [1.0]
    assert table.stats().outcomes == {**table.stats().outcomes, "accepted": 2, "full": 1}


def test_an_agent_of_ones_own_gets_its_turn_and_hands_in_a_result(tmp_path: Path) -> None:
    calls = re.findall(r"curl -s (?:-X (\w+) )?\S+:8642(\S+) .*? -d '(.*?)'", block("evaluate"), re.DOTALL)

    context = make_context(tmp_path)
    manifest = make_manifest(0)
    context.weights.put_blob(manifest.payloads[0].sha256, [PAYLOAD])
    context.weights.publish(manifest)

    with serving(context) as url:
        claimed, recorded = [
            httpx.request(method or "POST", url + path, json=json.loads(body), trust_env=False)
            for method, path, body in calls
        ]
        board = httpx.get(f"{url}/v1/evaluations", trust_env=False).json()

    assert (claimed.json()["granted"], recorded.status_code) == (True, 204)
    assert (board["best_version"], board["results"][0]["actor_id"]) == (0, "mine")


def test_table_names_every_outcome_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE))

    assert rows == {outcome.value: str(STATUS[outcome]) for outcome in InsertOutcome}
