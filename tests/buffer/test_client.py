"""The client bears with an absent service for as long as it was told, and says what was wrong."""

import http.server
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pytest

from buffer.client import HttpTable, HttpWeightStore, ServiceClient
from buffer.connection import ClientSettings
from buffer.errors import (
    Conflict,
    Oversize,
    ServiceUnreachable,
    StalewiseError,
    StoreUnavailable,
)
from buffer.weights.manifest import Payload
from tests.factories import make_group

QUICK = ClientSettings(retry_budget_s=20.0, retry_first_s=0.001, retry_max_s=0.002)
NEVER = ClientSettings(retry_budget_s=0.0)


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next (status, body) of the script, and hangs up where there is None."""

    script: ClassVar[list[tuple[int, bytes] | None]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answer = self.script.pop(0)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer[0])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def scripted(*script: tuple[int, bytes] | None) -> Iterator[str]:
    handler = type("Script", (Scripted,), {"script": list(script)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def error(name: str, detail: str = "why", hint: str = "what to do") -> bytes:
    return f'{{"error": "{name}", "detail": "{detail}", "hint": "{hint}"}}'.encode()


def test_lost_answers_proxy_errors_and_a_resting_store_are_retried() -> None:
    busy = (503, error("store_unavailable"))
    with scripted(None, busy, (502, b"<html>bad gateway</html>"), (200, b'{"a": 1}')) as url:
        client = ServiceClient(url, settings=QUICK, jitter=random.Random(1))

        assert client.get_json("/v1/stats") == {"a": 1}

        assert client.retries_total == 3
        client.close()


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        ((409, error("conflict")), Conflict, "why (what to do)"),
        ((503, error("store_unavailable")), StoreUnavailable, "why (what to do)"),
        ((500, error("internal_error")), StalewiseError, "why (what to do)"),
        (
            (404, b"<html>somebody else</html>"),
            ServiceUnreachable,
            "{url}/x answered 404 without naming an error (check that service.url points at a Stalewise service)",
        ),
    ],
)
def test_refusal_becomes_the_error_that_the_service_names(
    answer: tuple[int, bytes], kind: type[StalewiseError], sentence: str
) -> None:
    with scripted(answer) as url:
        client = ServiceClient(url, settings=NEVER)

        with pytest.raises(kind) as caught:
            client.get_json("/x")

        assert (type(caught.value), str(caught.value)) == (kind, sentence.format(url=url))
        client.close()


def test_budget_ends_in_service_unreachable_that_names_the_url() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    now_s = [0.0]

    def monotonic() -> float:
        now_s[0] += 1.0
        return now_s[0]

    settings = ClientSettings(retry_budget_s=5.0, retry_first_s=0.001, retry_max_s=0.001)
    client = ServiceClient(url, settings=settings, monotonic=monotonic)

    with pytest.raises(ServiceUnreachable, match=f"no answer from {url} to GET /v1/run: .*refused"):
        client.run_info()

    assert client.retries_total == 4
    client.close()


def test_stopping_ends_the_pause_between_attempts_and_a_last_one_follows() -> None:
    stopping = threading.Event()
    settings = ClientSettings(retry_budget_s=1000.0, retry_first_s=500.0, retry_max_s=500.0)
    client = ServiceClient(f"http://127.0.0.1:{closed_port()}", settings=settings, stopping=stopping)
    threading.Timer(0.1, stopping.set).start()
    started_s = time.monotonic()

    with pytest.raises(ServiceUnreachable):
        client.run_info()

    assert time.monotonic() - started_s < 100
    assert client.retries_total == 1
    client.close()


def test_body_too_large_for_the_service_is_an_error_not_an_outcome() -> None:
    with scripted((413, error("oversize"))) as url:
        client = ServiceClient(url, settings=NEVER)

        with pytest.raises(Oversize, match="why"):
            HttpTable(client).insert([make_group("a")])

        client.close()


def test_download_that_breaks_off_is_begun_again(tmp_path: Path) -> None:
    payload = Payload(kind="keyframe", version=0, sha256=sha256(b"right").hexdigest(), size_bytes=5)
    with scripted(None, (503, error("store_unavailable")), (200, b"right")) as url:
        client = ServiceClient(url, settings=QUICK)

        HttpWeightStore(client).download(payload, tmp_path / "weights")

        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("weights", b"right")]
        client.close()
