"""docs/submitting.md is true: its examples are accepted as they stand, its table has every outcome."""

import json
import re
from pathlib import Path

import httpx
import pytest

from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import TableSettings
from buffer.types import InsertOutcome
from services.intake_api import STATUS
from tests.services.live import make_context, serving

PAGE = (Path(__file__).parents[2] / "docs" / "submitting.md").read_text()
EXAMPLES = re.findall(r"8642(/v1/\w+) .*? -d '(.*?)'\n```", PAGE, re.DOTALL)


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


def test_table_names_every_outcome_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE))

    assert rows == {outcome.value: str(STATUS[outcome]) for outcome in InsertOutcome}
