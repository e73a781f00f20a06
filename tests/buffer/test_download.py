"""Downloads by ranges: side by side, and taken up again where they broke off, after a kill too."""

import http.server
import random
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pytest

from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import CorruptWeights, NotFound, ServiceUnreachable
from buffer.weights import download
from buffer.weights.manifest import Payload
from buffer.weights.progress import progress_path

CONTENT = random.Random(0).randbytes(100_000)
PAYLOAD = Payload(kind="keyframe", version=0, sha256=sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT))


class Fragile(http.server.BaseHTTPRequestHandler):
    """Serves ranges of CONTENT; hangs up, or stalls until `go_on`, after some bytes as often as it is told."""

    protocol_version = "HTTP/1.1"
    breaks: ClassVar[list[int]]
    asked: ClassVar[list[tuple[int, int]]]
    problem: ClassVar[bytes | None] = None
    go_on: ClassVar[threading.Event | None] = None

    def do_GET(self) -> None:
        if self.problem:
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(self.problem)))
            self.end_headers()
            self.wfile.write(self.problem)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match
        first, last = map(int, match.groups())
        assert self.headers["If-Range"] == f'"{PAYLOAD.sha256}"'
        self.asked.append((first, last))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        stop = first + self.breaks.pop() if self.breaks else last + 1
        self.wfile.write(CONTENT[first:stop])
        if stop <= last and self.go_on:
            self.go_on.wait()
        self.close_connection = stop <= last

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fragile(
    *breaks: int, problem: bytes | None = None, go_on: threading.Event | None = None
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    asked: list[tuple[int, int]] = []
    behaviour = {"breaks": list(breaks), "asked": asked, "problem": problem, "go_on": go_on}
    handler = type("Serving", (Fragile,), behaviour)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def fetch(url: str, path: Path, *, budget_s: float = 20.0, connections: int = 3) -> None:
    settings = ClientSettings(
        retry_budget_s=budget_s, retry_first_s=0.001, retry_max_s=0.002, download_connections=connections
    )
    client = ServiceClient(url, settings=settings)
    try:
        HttpWeightStore(client).download(PAYLOAD, path)
    finally:
        client.close()


def test_ranges_side_by_side_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RANGE_BYTES", 7_001)

    with fragile() as (url, asked):
        fetch(url, tmp_path / "payload")

    assert (tmp_path / "payload").read_bytes() == CONTENT
    assert sorted(asked) == [(s, min(s + 7_000, 99_999)) for s in range(0, 100_000, 7_001)]


def test_a_broken_download_goes_on_where_it_was(tmp_path: Path) -> None:
    with fragile(0, 60_000, 1, 30_000) as (url, asked):
        fetch(url, tmp_path / "payload", connections=1)

    assert (tmp_path / "payload").read_bytes() == CONTENT
    assert [first for first, _ in asked] == [0, 30_000, 30_001, 90_001, 90_001]


def test_a_service_that_stays_away_is_a_named_error_within_the_budget(tmp_path: Path) -> None:
    with fragile(10) as (url, _), pytest.raises(ServiceUnreachable, match="broke off"):
        fetch(url, tmp_path / "payload", budget_s=0.0)


def test_the_service_s_own_error_comes_through(tmp_path: Path) -> None:
    problem = b'{"error": "not_found", "detail": "the blob is gone", "hint": ""}'

    with fragile(problem=problem) as (url, _), pytest.raises(NotFound, match="the blob is gone"):
        fetch(url, tmp_path / "payload")


_DOWNLOADING = """
import sys
from pathlib import Path
from buffer.weights import download
from tests.buffer.test_download import fetch

download._PIECE_BYTES = 1_000
download.RANGE_BYTES = 40_000
fetch(sys.argv[1], Path(sys.argv[2]), connections=2)
"""


def test_a_killed_download_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RANGE_BYTES", 40_000)
    path, go_on = tmp_path / "payload", threading.Event()

    with fragile(25_500, 10_500, go_on=go_on) as (url, asked):
        child = subprocess.Popen([sys.executable, "-c", _DOWNLOADING, url, path])
        while received(path) < 35_000:
            assert child.poll() is None
        child.kill()
        child.wait()
        go_on.set()
        before = len(asked)
        fetch(url, path, connections=1)

    assert path.read_bytes() == CONTENT
    assert sum(last + 1 - first for first, last in asked[before:]) == 100_000 - 35_000
    assert [file.name for file in tmp_path.iterdir()] == ["payload"]


def received(path: Path) -> int:
    """Return what a download says that it has, once it has begun."""
    progress = progress_path(path)
    return sum(struct.unpack("<3Q", progress.read_bytes()[56:])) if progress.is_file() else 0


def broken_off(path: Path, num_bytes: int) -> None:
    """Leave a download as a service does that goes away."""
    with fragile(num_bytes) as (url, _), pytest.raises(ServiceUnreachable):
        fetch(url, path, budget_s=0.0)


def test_what_is_left_and_damaged_is_noticed_and_fetched_anew(tmp_path: Path) -> None:
    path = tmp_path / "payload"
    broken_off(path, 60_000)
    with path.open("r+b") as file:
        file.write(bytes([CONTENT[0] ^ 1]))

    with fragile() as (url, asked):
        with pytest.raises(CorruptWeights, match="what was left of an earlier download"):
            fetch(url, path)
        fetch(url, path)

    assert path.read_bytes() == CONTENT
    assert [first for first, _ in asked] == [60_000, 0]


def shorten_target(path: Path) -> None:
    path.write_bytes(CONTENT[:60_000])


def shorten_progress(path: Path) -> None:
    progress = progress_path(path)
    progress.write_bytes(progress.read_bytes()[:-1])


def of_another_payload(path: Path) -> None:
    progress = progress_path(path)
    progress.write_bytes(progress.read_bytes().replace(bytes.fromhex(PAYLOAD.sha256), bytes(32)))


def without_progress(path: Path) -> None:
    progress_path(path).unlink()


@pytest.mark.parametrize("change", [shorten_target, shorten_progress, of_another_payload, without_progress])
def test_what_is_left_of_something_else_is_not_taken_up(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "payload"
    broken_off(path, 60_000)
    change(path)

    with fragile() as (url, asked):
        fetch(url, path)

    assert path.read_bytes() == CONTENT
    assert asked == [(0, 99_999)]
