"""What the HTTP face answers to single trajectories, and to those who look at the groups."""

import json
from typing import Any

import httpx

from buffer.wire import JSON, PartsRequest, encode
from services.context import ServiceContext
from tests.factories import make_group, parts_of


def records(group_id: str, size: int, **fields: Any) -> list[dict[str, Any]]:
    body = encode(PartsRequest(trajectories=parts_of(group_id, size=size, **fields)), JSON)
    found: list[dict[str, Any]] = json.loads(body)["trajectories"]
    return found


def post(http: httpx.Client, *parts: object) -> httpx.Response:
    return http.post("/v1/trajectories", json={"schema": 1, "trajectories": list(parts)})


def test_pending_is_202_and_the_part_that_completes_the_group_is_200(http: httpx.Client) -> None:
    first, second = records("g", 2)

    pending, accepted, again = post(http, first), post(http, second), post(http, first)

    assert (pending.status_code, pending.json()["results"][0]["outcome"]) == (202, "pending")
    assert (accepted.status_code, accepted.json()) == (
        200,
        {"results": [{"group_id": "g", "trajectory_id": "g-1", "outcome": "accepted", "reason": ""}]},
    )
    assert (again.status_code, again.json()["results"][0]["outcome"]) == (200, "duplicate")
    assert http.get("/v1/groups/g").json()["summary"]["num_trajectories"] == 2


def test_late_part_is_409_with_the_error_shape(http: httpx.Client) -> None:
    post(http, *records("g", 2))

    late = post(http, records("g", 3)[2])

    assert late.status_code == 409
    assert set(late.json()) == {"error", "detail", "hint", "results"}
    assert late.json()["error"] == "group_closed"


def test_full_is_429_with_retry_after(http: httpx.Client) -> None:
    for name in "abc":
        post(http, *records(name, 1))

    full = post(http, *records("d", 1))

    assert (full.status_code, full.headers["retry-after"]) == (429, "1")


def test_malformed_part_is_named_and_counted_and_the_others_are_taken(
    http: httpx.Client, context: ServiceContext
) -> None:
    good, bad = records("g", 2)
    del bad["trajectory"]["behavior_logprobs"]

    response = post(http, good, bad, 7)

    assert response.status_code == 207
    assert [(r["trajectory_id"], r["outcome"]) for r in response.json()["results"]] == [
        ("g-0", "pending"),
        ("g-1", "invalid"),
        ("", "invalid"),
    ]
    assert "a missing one is not a ratio of 1" in response.json()["results"][1]["reason"]
    assert context.table.stats().part_outcomes == {"pending": 1, "invalid": 2}


def test_malformed_groups_are_counted_as_invalid(http: httpx.Client, context: ServiceContext) -> None:
    body = {"schema": 1, "groups": [{"group_id": "a"}, 5]}

    assert http.post("/v1/groups", json=body).status_code == 422

    assert http.get("/v1/stats").json()["table"]["outcomes"] == {"invalid": 2}


def test_page_follows_page_by_cursor(http: httpx.Client, context: ServiceContext) -> None:
    context.table.insert([make_group(name) for name in "abc"])

    first = http.get("/v1/groups", params={"limit": 2}).json()
    second = http.get("/v1/groups", params={"limit": 2, "cursor": first["cursor"]}).json()

    assert [[group["group_id"] for group in page["groups"]] for page in (first, second)] == [["c", "b"], ["a"]]
    assert second["cursor"] is None


def test_mixed_filters_and_bad_cursors_are_a_sentence(shared_http: httpx.Client) -> None:
    mixed = shared_http.get("/v1/groups", params={"split": "eval", "unused": "true"})
    cursor = shared_http.get("/v1/groups", params={"cursor": "x"})

    assert (mixed.status_code, cursor.status_code) == (422, 422)
    assert "give one of them" in mixed.json()["detail"]
    assert cursor.json()["detail"].startswith("cursor: string should match pattern")
