"""One request id from our client through the service and back, in every log line on the way."""

import logging
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from buffer.connection import ServiceClient
from buffer.errors import NotFound
from buffer.request_id import HEADER, current_request_id, request_scope
from tests.services.live import NO_RETRY, make_context, serving


def test_caller_s_id_is_returned_and_logged_and_a_bad_one_replaced(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "services.request_ids"):
        mine = http.get("/healthz", headers={HEADER: "trace-7:a"})
        bad = http.get("/healthz", headers={HEADER: "two words"})
        absent, other = http.get("/v1/groups/absent"), http.get("/healthz")

    assert mine.headers[HEADER] == "trace-7:a"
    made = {response.headers[HEADER] for response in (absent, other, bad)}
    assert len(made) == 3
    assert all(len(request_id) == 32 for request_id in made)
    logged = [record.getMessage().split(" in ")[0] for record in caplog.records[:3]]  # a line follows its answer
    assert logged == ["GET /healthz: 200", "GET /healthz: 200", "GET /v1/groups/absent: 404"]


def test_a_defect_is_logged_under_the_id_that_its_answer_carries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_context(tmp_path)
    (tmp_path / "weights" / "LATEST").write_text("not a number")

    with serving(context) as url:
        answered = httpx.get(f"{url}/v1/stats", headers={HEADER: "bad-day"}, trust_env=False)

    assert (answered.status_code, answered.headers[HEADER]) == (500, "bad-day")
    assert "GET /v1/stats: 500" in caplog.text


def test_client_sends_one_id_per_request_and_passes_on_the_one_at_hand(tmp_path: Path) -> None:
    with serving(make_context(tmp_path)) as url, closing(ServiceClient(url, settings=NO_RETRY)) as client:
        sent = [client.request("GET", "/v1/run").headers[HEADER] for _ in range(2)]
        with request_scope("outer"):
            passed_on = client.request("GET", "/v1/run").headers[HEADER]
            with pytest.raises(NotFound):
                client.get_json("/v1/groups/absent")

    assert sent[0] != sent[1]
    assert passed_on == "outer"
    assert current_request_id() == ""
