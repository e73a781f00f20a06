"""The schema that the service publishes is true: every route, every status, and the bodies that it really sends."""

from typing import Any

import httpx
import jsonschema
import msgpack
import pytest

from buffer.types import FinishReason
from buffer.wire import JSON, MSGPACK, InsertRequest, LearnerReport, PartsRequest, decode, encode
from services.security import ACCESS
from tests.factories import make_group, make_manifest, parts_of
from tests.services.trained import make_trained


@pytest.fixture
def openapi(http: httpx.Client) -> dict[str, Any]:
    schema: dict[str, Any] = http.get("/openapi.json").json()
    return schema


def check(openapi: dict[str, Any], route: str, response: httpx.Response) -> None:
    """Assert that a response is one that the schema announces."""
    method, path = route.split(" ")
    described = openapi["paths"][path][method.lower()]["responses"][str(response.status_code)]
    media_type = response.headers["Content-Type"].partition(";")[0]
    schema = described["content"][media_type]["schema"] | {"components": openapi["components"]}
    is_record = media_type in (JSON, MSGPACK)
    value = decode(response.content, media_type) if is_record else response.text
    jsonschema.Draft202012Validator(schema).validate(value)


def test_schema_lists_every_route_with_who_may_use_it(openapi: dict[str, Any]) -> None:
    described = {
        f"{method.upper()} {path}": "security" in operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }

    assert described == {route.replace(":path", ""): roles is not None for route, roles in ACCESS.items()}


def test_what_is_answered_without_a_body_announces_no_200(openapi: dict[str, Any]) -> None:
    empty = [
        operation["responses"]
        for methods in openapi["paths"].values()
        for operation in methods.values()
        if "204" in operation["responses"]
    ]

    assert len(empty) == 6
    assert sum("200" in responses for responses in empty) == 1  # GET /v1/weights/latest: with and without a newer one
    assert not any("content" in responses["204"] for responses in empty)


def test_every_body_is_described_in_both_encodings_and_every_reference_resolves(openapi: dict[str, Any]) -> None:
    references: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                references.add(node["$ref"])
            if JSON in node:
                assert node[JSON] == node[MSGPACK]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(openapi)

    assert references == {f"#/components/schemas/{name}" for name in openapi["components"]["schemas"]}


def test_real_responses_are_as_the_schema_says(http: httpx.Client, openapi: dict[str, Any]) -> None:
    group = encode(InsertRequest(groups=[make_group("a")]), JSON)
    json_type = {"Content-Type": JSON}
    draw = {"num_groups": 1, "learner_version": 0, "request_id": "r"}
    http.post("/v1/learner/metrics", json={"updates": 1, "version": 0, "metrics": {"a/b": 1.0}, "waiting": None})
    http.post("/v1/actors/a/heartbeat", json={"version": 0, "tokens_per_s": 1.0, "groups_total": 1, "state": "x"})

    check(openapi, "POST /v1/groups", http.post("/v1/groups", content=group, headers=json_type))
    check(openapi, "POST /v1/groups", http.post("/v1/groups", json={"schema": 1, "groups": [{}]}))
    mixed = [make_group("b").model_dump(mode="json"), {}]
    partly = http.post("/v1/groups", json={"schema": 1, "groups": mixed}, headers={"Accept": MSGPACK})
    check(openapi, "POST /v1/groups", partly)
    many = encode(InsertRequest(groups=[make_group(f"c{number}") for number in range(9)]), MSGPACK)
    check(openapi, "POST /v1/groups", http.post("/v1/groups", content=many, headers={"Content-Type": MSGPACK}))
    last = encode(InsertRequest(groups=[make_group("d")]), MSGPACK)
    full = http.post("/v1/groups", content=last, headers={"Content-Type": MSGPACK, "Accept": MSGPACK})
    check(openapi, "POST /v1/groups", full)
    assert (partly.status_code, full.status_code) == (207, 429)
    check(openapi, "POST /v1/groups", http.post("/v1/groups", content=b"", headers={"Content-Type": "text/plain"}))
    check(openapi, "POST /v1/sample", http.post("/v1/sample", json=draw))
    check(openapi, "POST /v1/sample", http.post("/v1/sample", json={}))
    check(openapi, "GET /v1/groups/{group_id}", http.get("/v1/groups/a"))
    check(openapi, "GET /v1/groups/{group_id}", http.get("/v1/groups/absent"))
    parts = encode(PartsRequest(trajectories=parts_of("p", size=2)[:1]), JSON)
    check(openapi, "POST /v1/trajectories", http.post("/v1/trajectories", content=parts, headers=json_type))
    check(openapi, "POST /v1/trajectories", http.post("/v1/trajectories", json={"schema": 1, "trajectories": [{}]}))
    check(openapi, "POST /v1/import", http.post("/v1/import", content=group, headers=json_type))
    check(openapi, "GET /v1/groups", http.get("/v1/groups"))
    check(openapi, "GET /v1/groups", http.get("/v1/groups?limit=0"))
    check(openapi, "GET /v1/export", http.get("/v1/export"))
    check(openapi, "GET /v1/prompts", http.get("/v1/prompts"))
    check(openapi, "POST /v1/priorities", http.post("/v1/priorities", json={"schema": 1, "priorities": {"a": 1.0}}))
    check(openapi, "GET /v1/run", http.get("/v1/run"))
    check(openapi, "GET /v1/run", http.get("/v1/run", headers={"Accept": MSGPACK}))
    check(openapi, "GET /", http.get("/"))
    for name in ("index.html", "page.css", "page.js"):
        check(openapi, "GET /static/{name}", http.get(f"/static/{name}"))
    check(openapi, "GET /healthz", http.get("/healthz"))
    check(openapi, "GET /v1/stats", http.get("/v1/stats"))
    check(openapi, "GET /v1/weights/{version}", http.get("/v1/weights/0"))
    manifest = encode(make_manifest(0), JSON)
    check(openapi, "PUT /v1/weights/{version}", http.put("/v1/weights/0", content=manifest, headers=json_type))


def test_what_the_dashboard_reads_is_as_the_schema_says(http: httpx.Client, openapi: dict[str, Any]) -> None:
    trained = encode(LearnerReport(updates=1, version=1, metrics={}, trained=(make_trained("a"),)), JSON)
    assert http.post("/v1/learner/metrics", content=trained, headers={"Content-Type": JSON}).status_code == 204

    check(openapi, "GET /metrics", http.get("/metrics"))
    check(openapi, "GET /v1/trained", http.get("/v1/trained"))
    check(openapi, "GET /v1/trained/{group_id}", http.get("/v1/trained/a"))
    check(openapi, "GET /v1/trained/{group_id}", http.get("/v1/trained/absent"))
    check(openapi, "GET /v1/history", http.get("/v1/history"))
    texts = http.post("/v1/token_texts", json={"token_ids": [0, 999_999]})
    check(openapi, "POST /v1/token_texts", texts)
    assert texts.json() == {"texts": ["<pad>", None]}


_BREAKING: tuple[dict[str, object], ...] = ({"schema": 2}, {"groups": []}, {"extra": 1})


def test_schema_refuses_what_the_service_refuses(openapi: dict[str, Any]) -> None:
    """A described body is not just any body: the validator is no decoration."""
    schema = {"$ref": "#/components/schemas/InsertRequest", "components": openapi["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    good = msgpack.unpackb(msgpack.packb({"schema": 1, "groups": [make_group("a").model_dump(mode="json")]}))

    assert validator.is_valid(good)
    assert [validator.is_valid(good | change) for change in _BREAKING] == [False, False, False]
    good["groups"][0]["trajectories"][0]["finish_reason"] = f"not {FinishReason.STOP}"
    assert not validator.is_valid(good)
