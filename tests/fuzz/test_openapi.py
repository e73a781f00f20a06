"""Requests made from our own OpenAPI, valid and spoilt: no 5xx, no answer that the schema does not know, and nothing is
stored by a request that was refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import msgpack
import pytest
import schemathesis
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CheckContext, CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from buffer.rate_limiter import RateLimiterSettings
from buffer.table import ReplayTable, TableStats
from buffer.wire import MSGPACK
from services.context import ServiceSettings
from services.security import ACCESS
from tests.factories import make_group
from tests.services.live import make_context, serving

EXAMPLES = 8
"""Requests per operation and mode; times --fuzz-scale."""
ROUTES = [route for route in ACCESS if "{" in route or not route.startswith("GET ") or route.endswith("latest")]
"""What takes parameters or a body; there is nothing to generate for the others."""
STORING = ("POST /v1/groups", "POST /v1/trajectories", "POST /v1/import")


def spoilt_requests_are_refused(ctx: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    """Assert it, but of a body over the limit, which is refused for its size before anybody looks for faults."""
    return None if response.status_code == 413 else negative_data_rejection(ctx, response, case)


CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    spoilt_requests_are_refused,
]


@schemathesis.serializer(MSGPACK)
def as_msgpack(context: object, value: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(value)
    except OverflowError:  # an integer of more than 64 bits, which msgpack cannot say
        hypothesis.reject()
    return packed


@schemathesis.deserializer(MSGPACK)
def from_msgpack(context: object, response: Response) -> Any:
    return msgpack.unpackb(response.content)


@dataclass(frozen=True)
class Fuzzed:
    """A served app whose table is in this process."""

    url: str
    table: ReplayTable
    schema: Any


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    context = make_context(
        tmp_path_factory.mktemp("fuzzed"),
        settings=ServiceSettings(max_body_bytes=100_000, max_blob_bytes=100_000),
        limiter=RateLimiterSettings(min_size=4, error_buffer=1e6),
    )
    context.table.advance_version(0)
    context.table.insert([make_group("g0"), make_group("g1")])
    with serving(context) as url:
        context.closing.set()  # as in a drain: requests that may wait answer at once
        yield Fuzzed(url, context.table, schemathesis.openapi.from_url(f"{url}/openapi.json"))


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES)
def test_generated_requests_are_answered_as_the_schema_says(
    fuzzed: Fuzzed, route: str, mode: GenerationMode, request: pytest.FixtureRequest
) -> None:
    method, path = route.replace(":path", "").split(" ")
    operation = fuzzed.schema[path][method]
    budget = hypothesis.settings(
        max_examples=round(EXAMPLES * request.config.getoption("fuzz_scale")),
        deadline=None,
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.generate,),  # shrinking takes minutes; the report holds a curl command as it is
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @budget
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        before = fuzzed.table.stats()
        response = case.call_and_validate(base_url=fuzzed.url, checks=CHECKS, timeout=60)
        assert_stored(before, fuzzed.table.stats(), response, route)

    ask()


def assert_stored(before: TableStats, after: TableStats, response: Response, route: str) -> None:
    """Assert that the table took what was accepted, and nothing else."""
    accepted = 0
    if route in STORING and response.status_code in (200, 202, 207):
        accepted = sum(result["outcome"] == "accepted" for result in response.json()["results"])
    assert after.inserted_total + after.num_eval - before.inserted_total - before.num_eval == accepted
