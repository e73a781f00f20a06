"""Bodies that try to cost more than they weigh: refused by name, before they are read or unfolded."""

import gzip
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import msgpack
import pytest

from buffer.wire import JSON, MSGPACK
from services.context import ServiceContext
from tests.services.live import make_context, serving

ROUTES = [
    "POST /v1/groups",
    "POST /v1/trajectories",
    "POST /v1/import",
    "POST /v1/priorities",
    "POST /v1/sample",
    "POST /v1/learner/metrics",
    "POST /v1/actors/a/heartbeat",
    "PUT /v1/weights/0",
]
HEAD = "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with the limits that ship: 128 MiB for a body."""
    with serving(make_context(tmp_path_factory.mktemp("hostile"))) as url:
        yield url


@pytest.fixture
def wire(service: str) -> Iterator[socket.socket]:
    """A bare connection, for requests that no HTTP library would send."""
    address = urlsplit(service)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        yield connection


def send(url: str, route: str, content: bytes, **headers: str) -> httpx.Response:
    method, path = route.split(" ")
    named = {"Content-Type": JSON} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, url + path, content=content, headers=named, timeout=60, trust_env=False)


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_announced_too_long_is_refused_before_any_of_it_is_sent(wire: socket.socket, route: str) -> None:
    method, path = route.split(" ")
    head = HEAD.format(method=method, path=path) + f"Content-Length: {1 << 40}\r\n\r\n"

    wire.sendall(head.encode())

    assert wire.recv(65_536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("route", ROUTES)
def test_a_compressed_body_is_refused_and_never_unfolded(service: str, route: str) -> None:
    bomb = gzip.compress(b" " * (1 << 24))

    response = send(service, route, bomb, Content_Encoding="gzip")

    assert (response.status_code, response.json()["error"]) == (415, "unsupported_media_type")
    assert response.json()["detail"] == "cannot read Content-Encoding 'gzip'"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x00",
        b"\xdd\x00\x03\xff\xff" + b"\x90" * 0x3FFFF,
        b"\xc7\x0c\xff" + b"\x00" * 12,
    ],
    ids=["lists", "maps", "long-list", "long-map", "long-bytes", "long-extension", "many-lists", "timestamp"],
)
def test_a_msgpack_bomb_is_a_named_error(service: str, route: str, bomb: bytes) -> None:
    response = send(service, route, bomb, Content_Type=MSGPACK)

    assert (response.status_code, response.json()["error"]) == (422, "invalid_record")


@pytest.mark.parametrize("route", ROUTES)
def test_a_deeply_nested_json_body_is_a_named_error(service: str, route: str) -> None:
    response = send(service, route, b'{"a":' * 100_000)

    assert (response.status_code, response.json()["error"]) == (422, "invalid_request")


@pytest.mark.parametrize("route", ROUTES)
def test_a_json_bomb_is_a_named_error(service: str, route: str) -> None:
    response = send(service, route, b'{"groups":[' + b"[]," * 100_000 + b"[]]}")

    assert (response.status_code, response.json()["error"]) == (422, "invalid_request")
    assert response.json()["detail"] == "the body has more lists and maps than a record of this size can hold"


@pytest.mark.parametrize(("route", "field"), [("POST /v1/groups", "groups"), ("POST /v1/trajectories", "trajectories")])
def test_more_records_than_a_request_may_bring_are_refused_unread(service: str, route: str, field: str) -> None:
    response = send(service, route, b'{"schema":1,"%s":[' % field.encode() + b"1," * 65_536 + b"1]}")

    assert response.status_code == 422
    assert f"{field}: " in response.json()["detail"]
    assert "at most 65536 items" in response.json()["detail"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("POST /v1/sample", b'{"num_groups":1,"request_id":"r","learner_version":%d}'),
        ("POST /v1/learner/metrics", b'{"updates":%d,"version":0,"metrics":{}}'),
        ("POST /v1/actors/a/heartbeat", b'{"version":0,"tokens_per_s":1,"groups_total":%d,"state":"x"}'),
    ],
)
def test_an_integer_that_msgpack_cannot_carry_is_refused(service: str, route: str, body: bytes) -> None:
    response = send(service, route, body % 10**30)

    assert response.status_code == 422
    assert "input should be less than 9007199254740992, got an integer of more than 64" in response.json()["detail"]


def test_a_wait_of_nan_seconds_is_refused(service: str) -> None:
    waiting = {"who": "actors", "since_s": float("nan"), "reason": ""}
    body = msgpack.packb({"updates": 1, "version": 0, "metrics": {}, "waiting": waiting})

    response = send(service, "POST /v1/learner/metrics", body, Content_Type=MSGPACK)

    assert response.json()["detail"] == "waiting.since_s: input should be a finite number, got nan"


def test_slow_bodies_hold_up_nobody_else(service: str) -> None:
    address = urlsplit(service)
    slow = [socket.create_connection((address.hostname, address.port), timeout=60) for _ in range(100)]
    head = HEAD.format(method="POST", path="/v1/groups") + "Content-Length: 100\r\n\r\n{"
    for connection in slow:
        connection.sendall(head.encode())

    answered = httpx.get(f"{service}/v1/stats", timeout=60, trust_env=False).status_code
    for connection in slow:
        connection.close()  # in the middle of the body

    assert answered == 200
    assert httpx.get(f"{service}/v1/stats", timeout=60, trust_env=False).json()["table"]["outcomes"] == {}


def test_a_chunked_body_is_dropped_at_the_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    context: ServiceContext = make_context(tmp_path_factory.mktemp("chunked"))
    limit = context.settings.max_body_bytes
    with serving(context) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            head = HEAD.format(method="POST", path="/v1/groups") + "Transfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode())
            chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
            for _ in range(limit // (1 << 20) + 1):  # the request never says that it ends
                connection.sendall(chunk)

            assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
