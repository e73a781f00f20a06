"""What the HTTP face answers to submitted groups and to draws, good and bad."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest

from buffer.client import HttpTable
from buffer.connection import ServiceClient
from buffer.types import Part, Split
from buffer.wire import JSON, MSGPACK, InsertRequest, encode
from services.context import ServiceContext
from tests.factories import RUN_ID, make_group, make_trajectory
from tests.services.live import NO_RETRY


def record(group_id: str = "g0", **changes: Any) -> dict[str, Any]:
    """Return a group as JSON carries it, with changes to its first trajectory."""
    body: dict[str, Any] = json.loads(encode(InsertRequest(groups=[make_group(group_id)]), JSON))["groups"][0]
    body["trajectories"][0].update(changes)
    return body


def post(http: httpx.Client, *records: object) -> httpx.Response:
    return http.post("/v1/groups", json={"schema": 1, "groups": list(records)})


def test_json_and_msgpack_of_one_group_are_the_same_group(http: httpx.Client) -> None:
    packed = encode(InsertRequest(groups=[make_group("g0")]), MSGPACK)

    first = post(http, record("g0"))
    second = http.post("/v1/groups", content=packed, headers={"Content-Type": MSGPACK, "Accept": MSGPACK})

    assert (first.status_code, first.json()) == (
        200,
        {"results": [{"group_id": "g0", "outcome": "accepted", "reason": ""}]},
    )
    assert (second.status_code, second.headers["content-type"]) == (200, MSGPACK)
    assert msgpack.unpackb(second.content)["results"][0]["outcome"] == "duplicate"


def test_common_outcome_has_its_own_status_and_the_error_shape(http: httpx.Client) -> None:
    post(http, record("a"))

    response = post(http, record("a", reward=0.5))

    reason = "group_id was used before for other content; give new data a new id"
    assert (response.status_code, response.json()) == (
        409,
        {
            "error": "conflict",
            "detail": reason,
            "hint": "do not send these again",
            "results": [{"group_id": "a", "outcome": "conflict", "reason": reason}],
        },
    )


def test_full_is_429_with_retry_after(http: httpx.Client) -> None:
    accepted = [post(http, record(name)).status_code for name in ("a", "b", "c")]

    response = post(http, record("d"))

    assert accepted == [200, 200, 200]
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert [result["outcome"] for result in response.json()["results"]] == ["full"]


def test_different_outcomes_are_207_in_the_order_submitted_and_the_good_ones_are_stored(
    http: httpx.Client, context: ServiceContext
) -> None:
    response = post(http, record("a"), {"group_id": "b"}, record("c", response_ids=[]), "no group", record("d"))

    assert response.status_code == 207
    assert [(result["group_id"], result["outcome"]) for result in response.json()["results"]] == [
        ("a", "accepted"),
        ("b", "invalid"),
        ("c", "invalid"),
        ("", "invalid"),
        ("d", "accepted"),
    ]
    assert context.table.stats().num_groups == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": None}, "group 'g0': trajectories.0.reward: input should be a valid number, got None"),
        ({"response_mask": [0, 0, 0, 0]}, "group 'g0': trajectories.0.response_mask: expected a flat list for bool"),
        ({"behavior_logprobs": [0.5] * 4}, "group 'g0': trajectories.0: behavior_logprobs must not be above 0"),
        ({"spans": [{"start": 1, "end": 4, "version": 0}]}, "group 'g0': trajectories.0: spans must tile the response"),
        ({"unknown": 1}, "group 'g0': trajectories.0.unknown: extra inputs are not permitted, got 1"),
        (
            {"spans": [{"start": 0, "end": 4, "version": 7}]},
            "a span claims version 7, the latest published version is 0",
        ),
    ],
)
def test_malformed_group_is_422_with_one_sentence_and_is_not_stored(
    http: httpx.Client, context: ServiceContext, change: dict[str, Any], reason: str
) -> None:
    response = post(http, record(**change))

    assert response.status_code == 422
    assert response.json()["error"] == "invalid"
    assert response.json()["detail"].startswith(reason)
    assert response.json()["results"][0] | {"reason": ""} == {"group_id": "g0", "outcome": "invalid", "reason": ""}
    assert context.table.stats().num_groups == 0


@pytest.mark.parametrize(
    ("content", "media_type", "status", "error", "detail"),
    [
        (b"{", JSON, 422, "invalid_request", "the body is not application/json: EOF"),
        (b'{"schema":1,"groups":[NaN]}', JSON, 422, "invalid_request", "the body is not application/json: expected"),
        (b'{"schema":1,"groups":[{"a":Infinity}]}', JSON, 422, "invalid_request", "the body is not application/json"),
        (b'{"schema":2,"groups":[{}]}', JSON, 422, "invalid_request", "schema: input should be 1, got 2"),
        (b'{"schema":1,"groups":[]}', JSON, 422, "invalid_request", "groups: list should have at least 1 item"),
        (b'{"groups":[{}], "x": 1}', JSON, 422, "invalid_request", "x: extra inputs are not permitted"),
        (b"[]", JSON, 422, "invalid_request", "the body is a list, not a map of fields"),
        (b"\x81\xa1", MSGPACK, 422, "invalid_record", "not a msgpack message"),
        (b"[" * 50_000, JSON, 413, "oversize", "the body has 50000 bytes or more, the limit is 20000"),
        (b"[" * 10_000, JSON, 422, "invalid_request", "the body is not application/json: recursion limit exceeded"),
        (b"\x91" * 10_000, MSGPACK, 422, "invalid_record", "not a msgpack message"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "cannot read Content-Type"),
        (b"", "", 415, "unsupported_media_type", "cannot read Content-Type ''"),
    ],
)
def test_bad_body_is_refused_in_the_one_error_shape(
    shared_http: httpx.Client, content: bytes, media_type: str, status: int, error: str, detail: str
) -> None:
    response = shared_http.post("/v1/groups", content=content, headers={"Content-Type": media_type})

    assert response.status_code == status
    assert set(response.json()) == {"error", "detail", "hint"}
    assert response.json()["error"] == error
    assert response.json()["detail"].startswith(detail)


def test_chunked_body_without_a_length_is_refused_once_it_is_too_long(shared_http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    response = shared_http.post("/v1/groups", content=endless(), headers={"Content-Type": JSON})

    assert (response.status_code, response.json()["error"]) == (413, "oversize")


@pytest.mark.parametrize(
    ("method", "path", "accept", "status", "error"),
    [
        ("GET", "/v1/nothing", "*/*", 404, "not_found"),
        ("GET", "/v1/sample", "*/*", 405, "method_not_allowed"),
        ("GET", "/v1/run", "text/html", 406, "not_acceptable"),
        ("GET", "/v1/run", "application/json;q=0", 406, "not_acceptable"),
        ("GET", "/v1/groups/absent", "*/*", 404, "not_found"),
        ("GET", "/v1/groups/%20", "*/*", 422, "invalid_request"),
        ("GET", "/static/absent.js", "*/*", 404, "not_found"),
    ],
)
def test_every_error_has_the_one_shape(
    shared_http: httpx.Client, method: str, path: str, accept: str, status: int, error: str
) -> None:
    response = shared_http.request(method, path, headers={"Accept": accept})

    assert (response.status_code, response.json()["error"]) == (status, error)
    assert set(response.json()) == {"error", "detail", "hint"}


def test_answer_is_in_the_encoding_that_the_caller_likes_best(shared_http: httpx.Client) -> None:
    accepts = ["*/*", "application/*", f"{JSON};q=0.5, {MSGPACK}", f"text/html, {MSGPACK};q=0.1", f"{MSGPACK}, {JSON}"]

    answers = [shared_http.get("/v1/run", headers={"Accept": accept}).headers["content-type"] for accept in accepts]

    assert answers == [JSON, JSON, MSGPACK, MSGPACK, MSGPACK]


def test_draw_is_the_same_in_json_and_msgpack(http: httpx.Client) -> None:
    post(http, record("a"))
    draw = {"num_groups": 1, "learner_version": 3, "request_id": "r"}

    as_json = http.post("/v1/sample", json=draw)
    as_msgpack = http.post("/v1/sample", json=draw, headers={"Accept": MSGPACK})

    info = {"probability": 1.0, "num_candidates": 1, "times_sampled": 1, "age_updates": 3}
    assert as_json.json() == {"schema": 1, "samples": [{"group": record("a"), "info": info}]}
    packed = msgpack.packb({"schema": 1, "samples": [{"group": make_group("a").model_dump(), "info": info}]})
    assert msgpack.unpackb(as_msgpack.content) == msgpack.unpackb(packed)


def test_draw_that_is_impossible_in_time_is_an_empty_answer(shared_http: httpx.Client) -> None:
    response = shared_http.post(
        "/v1/sample", json={"num_groups": 1, "learner_version": 0, "request_id": "r", "timeout_s": 0.05}
    )

    assert (response.status_code, response.json()) == (200, {"schema": 1, "samples": []})


def test_waiting_draw_is_woken_by_an_insert(http: httpx.Client) -> None:
    draw = {"num_groups": 1, "learner_version": 0, "request_id": "r", "timeout_s": 60}
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(http.post("/v1/sample", json=draw, timeout=60)))
    waiting.start()
    while not http.get("/v1/stats").json()["table"]["waits"]:
        time.sleep(0.01)

    post(http, record("a"))
    waiting.join(30)

    assert [sample["group"]["group_id"] for sample in answers[0].json()["samples"]] == ["a"]


def test_many_waiting_draws_leave_the_service_responsive(http: httpx.Client, context: ServiceContext) -> None:
    """More waiting requests than worker threads (40): a wait must not hold a thread."""
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=http.base_url, limits=limits, timeout=60, trust_env=False) as client:
        draws = [{"num_groups": 1, "learner_version": 0, "request_id": f"r{i}", "timeout_s": 60} for i in range(60)]
        threads = [threading.Thread(target=client.post, args=("/v1/sample",), kwargs={"json": d}) for d in draws]
        for thread in threads:
            thread.start()

        assert http.get("/v1/run", timeout=20).status_code == 200

        context.closing.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)


def test_client_sends_what_is_over_the_limit_of_a_body_in_several_requests(http: httpx.Client) -> None:
    trajectories = [[make_trajectory("t", response_ids=range(1, 1001))] for _ in range(3)]  # 20,000 bytes hold two
    groups = [make_group(name, trajectories=members) for name, members in zip("abc", trajectories, strict=True)]
    client = ServiceClient(str(http.base_url), settings=NO_RETRY)

    first, again = HttpTable(client).submit(groups), HttpTable(client).submit([*groups, make_group("d")])
    imported = HttpTable(client).import_groups(groups, foreign=False)
    parts = [
        Part(run_id=RUN_ID, group_id=name, prompt_id="p0", split=Split.TRAIN, group_size=2, trajectory=members[0])
        for name, members in zip("xyz", trajectories, strict=True)
    ]
    held = HttpTable(client).insert_parts(parts)
    client.close()

    assert [(result.group_id, result.outcome.value) for result in first.results] == [
        ("a", "accepted"),
        ("b", "accepted"),
        ("c", "accepted"),
    ]
    assert [result.outcome.value for result in again.results] == ["duplicate", "duplicate", "duplicate", "full"]
    assert again.retry_after_s == 1.0
    assert [result.outcome.value for result in imported.results] == ["duplicate"] * 3
    assert [(result.group_id, result.outcome.value) for result in held] == [(name, "pending") for name in "xyz"]


def test_impossible_draw_is_refused(shared_http: httpx.Client) -> None:
    response = shared_http.post("/v1/sample", json={"num_groups": 2, "learner_version": 0, "request_id": "r"})

    assert (response.status_code, response.json()) == (
        422,
        {
            "error": "invalid_request",
            "detail": "num_groups=2 is above limiter.min_size=1: the table need not ever hold that many groups",
            "hint": "raise min_size to at least 2",
        },
    )


def test_reports_of_actors_and_learner_appear_in_the_statistics(http: httpx.Client) -> None:
    load = {"version": 3, "publish_to_loaded_s": 0.25}
    counts = {"groups_total": 7, "unscored_groups_total": 1}
    beat = {"version": 3, "tokens_per_s": 10.5, **counts, "state": "generating", "detail": "", "loads": [load]}
    report = {"updates": 4, "total_updates": 9, "version": 3, "metrics": {"reward/mean": 0.5}, "waiting": None}

    assert http.post("/v1/actors/host-1/heartbeat", json=beat).status_code == 204
    assert http.post("/v1/learner/metrics", json=report).status_code == 204

    stats = http.get("/v1/stats").json()
    assert [actor | {"age_s": 0} for actor in stats["actors"]] == [{"actor_id": "host-1", **beat, "age_s": 0}]
    assert stats["learner"] | {"age_s": 0} == {**report, "age_s": 0}
    assert stats["promises"] == {"appendfsync": "never: this is memory"}


def test_metric_that_is_not_a_number_is_refused(shared_http: httpx.Client) -> None:
    body = msgpack.packb({"updates": 4, "version": 3, "metrics": {"reward/mean": float("nan")}, "waiting": None})

    response = shared_http.post("/v1/learner/metrics", content=body, headers={"Content-Type": MSGPACK})

    assert response.json() == {
        "error": "invalid_request",
        "detail": "metrics.reward/mean: input should be a finite number, got nan",
        "hint": "",
    }
