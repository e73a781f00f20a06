"""Publishing, long polls, and payloads that any HTTP cache can fan out."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from buffer.client import HttpWeightStore, ServiceClient
from buffer.types import InsertOutcome
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.manifest import Manifest
from buffer.wire import JSON, encode
from services.context import ServiceContext
from tests.factories import PAYLOAD, make_group, make_manifest
from tests.services.live import NO_RETRY, make_context, serving

NAME = sha256(PAYLOAD).hexdigest()


def publish(http: httpx.Client, version: int) -> None:
    assert http.put(f"/v1/weights/blobs/{NAME}", content=PAYLOAD).status_code == 204
    manifest = encode(make_manifest(version), JSON)
    assert http.put(f"/v1/weights/{version}", content=manifest, headers={"Content-Type": JSON}).status_code == 204


def test_publication_is_served_and_advances_the_table(http: httpx.Client, context: ServiceContext) -> None:
    publish(http, 4)

    latest = http.get("/v1/weights/latest")

    assert latest.content == http.get("/v1/weights/4").content == encode(make_manifest(4), JSON)
    assert http.get("/v1/run").json() | {"limits": {}} == {
        "run_id": "test-run",
        "schema": 1,
        "model_fingerprint": make_manifest(4).model_fingerprint,
        "latest_version": 4,
        "limits": {},
        "tokens_required": False,
    }
    assert context.table.stats().latest_version == 4


def test_whoever_sees_a_version_can_submit_what_it_drew(tmp_path: Path) -> None:
    seen: list[InsertOutcome] = []

    class SeenAtOnce(DirectoryWeightStore):
        def publish(self, manifest: Manifest) -> None:
            super().publish(manifest)
            seen.extend(result.outcome for result in context.table.insert([make_group(version=manifest.version)]))

    context = make_context(tmp_path, weights=SeenAtOnce(tmp_path / "weights"))
    with serving(context) as url, httpx.Client(base_url=url) as client:
        publish(client, 4)

    assert seen == [InsertOutcome.ACCEPTED]


def test_a_version_that_is_refused_leaves_the_table_where_it_was(http: httpx.Client, context: ServiceContext) -> None:
    publish(http, 4)

    for manifest, status in ((make_manifest(3), 409), (make_manifest(9, payload=b"never stored"), 404)):
        body = encode(manifest, JSON)
        answer = http.put(f"/v1/weights/{manifest.version}", content=body, headers={"Content-Type": JSON})
        assert answer.status_code == status

    assert context.table.stats().latest_version == 4


@pytest.mark.parametrize(
    ("headers", "status", "content", "expected"),
    [
        ({}, 200, PAYLOAD, {"content-length": "18", "content-type": "application/octet-stream"}),
        ({"Range": "bytes=4-9"}, 206, PAYLOAD[4:10], {"content-range": "bytes 4-9/18", "content-length": "6"}),
        ({"Range": "bytes=10-"}, 206, PAYLOAD[10:], {"content-range": "bytes 10-17/18"}),
        ({"Range": "bytes=-3"}, 206, PAYLOAD[-3:], {"content-range": "bytes 15-17/18"}),
        ({"Range": "bytes=4-99"}, 206, PAYLOAD[4:], {"content-range": "bytes 4-17/18"}),
        ({"Range": "bytes=4-9", "If-Range": f'"{NAME}"'}, 206, PAYLOAD[4:10], {}),
        ({"Range": "bytes=4-9", "If-Range": '"other"'}, 200, PAYLOAD, {}),
        ({"Range": "bytes=1-2,4-5"}, 200, PAYLOAD, {}),
        ({"Range": "lines=1-2"}, 200, PAYLOAD, {}),
        ({"If-None-Match": f'"{NAME}"'}, 304, b"", {}),
    ],
)
def test_payload_is_immutable_and_can_be_had_in_ranges(
    http: httpx.Client, headers: dict[str, str], status: int, content: bytes, expected: dict[str, str]
) -> None:
    publish(http, 0)

    response = http.get(f"/v1/weights/blobs/{NAME}", headers=headers)

    assert (response.status_code, response.content) == (status, content)
    always = {"etag": f'"{NAME}"', "cache-control": "public, max-age=31536000, immutable", "accept-ranges": "bytes"}
    assert dict(response.headers) | expected | always == dict(response.headers)


def test_nothing_more_is_read_for_a_caller_that_hung_up(tmp_path: Path) -> None:
    payload, read = bytes(64 << 20), 0

    class Counting(DirectoryWeightStore):
        def blob_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
            nonlocal read
            for chunk in super().blob_range(sha256, start, stop):
                read += len(chunk)
                yield chunk

    with serving(make_context(tmp_path, weights=Counting(tmp_path / "weights"))) as url:
        blob = f"{url}/v1/weights/blobs/{sha256(payload).hexdigest()}"
        assert httpx.put(blob, content=payload).status_code == 204
        with httpx.stream("GET", blob) as response:
            next(response.iter_raw())
        read_at_first = -1
        while read != read_at_first:
            read_at_first = read
            time.sleep(0.2)

    assert 0 < read < len(payload)


@pytest.mark.parametrize("asked", ["bytes=18-", "bytes=99-100", "bytes=9-4", "bytes=-0"])
def test_range_outside_the_payload_is_416_in_the_one_error_shape(http: httpx.Client, asked: str) -> None:
    publish(http, 0)

    response = http.get(f"/v1/weights/blobs/{NAME}", headers={"Range": asked})

    assert (response.status_code, response.json()) == (
        416,
        {
            "error": "range_not_satisfiable",
            "detail": f"the range {asked} lies outside the payload of 18 bytes",
            "hint": "",
        },
    )


def chunked() -> Iterator[bytes]:
    for _ in range(10):
        yield b"x" * 1000


@pytest.mark.parametrize(
    ("path", "request_parts", "status", "error", "detail"),
    [
        (f"blobs/{'0' * 64}", {"content": b"x"}, 422, "corrupt_weights", "the payload has the hash 2d711642"),
        (
            f"blobs/{'0' * 64}",
            {"content": b"x" * 5000},
            413,
            "oversize",
            "the body has 5000 bytes or more, the limit is 4096",
        ),
        (
            f"blobs/{'0' * 64}",
            {"content": chunked},
            413,
            "oversize",
            "the body has ",
        ),
        ("blobs/..%2FLATEST", {"content": b"x"}, 404, "not_found", "PUT /v1/weights/blobs/../LATEST: not found"),
        ("blobs/abc", {"content": b"x"}, 422, "invalid_request", "path.sha256: string should match pattern"),
        ("0", {"content": b"{}"}, 415, "unsupported_media_type", "cannot read Content-Type ''"),
        ("0", {"json": {}}, 422, "invalid_request", "run_id: field required (and 6 more)"),
        ("-1", {"json": {}}, 422, "invalid_request", "path.version: input should be greater than or equal to 0"),
        ("1", {"manifest": {}}, 422, "invalid_request", "the path says version 1, the manifest 0"),
        (
            "0",
            {"manifest": {"run_id": "x"}},
            409,
            "run_mismatch",
            "the manifest is of run x, this service serves test-run",
        ),
        ("0", {"manifest": {}}, 404, "not_found", f"blob {NAME} is not stored"),
    ],
)
def test_bad_publication_is_refused_and_nothing_of_it_is_served(
    http: httpx.Client,
    context: ServiceContext,
    tmp_path: Path,
    path: str,
    request_parts: dict[str, Any],
    status: int,
    error: str,
    detail: str,
) -> None:
    if request_parts.get("content") is chunked:
        request_parts = {"content": chunked()}
    if "manifest" in request_parts:
        manifest = make_manifest(0).model_copy(update=request_parts["manifest"])
        request_parts = {"content": encode(manifest, JSON), "headers": {"Content-Type": JSON}}

    response = http.put(f"/v1/weights/{path}", **request_parts)

    assert (response.status_code, response.json()["error"]) == (status, error)
    assert response.json()["detail"].startswith(detail)
    assert http.get("/v1/weights/latest").status_code == 204
    assert context.weights.status().bytes == 0
    assert not list((tmp_path / "weights" / "incoming").iterdir())


def test_version_is_never_published_twice_but_a_retry_is_harmless(http: httpx.Client) -> None:
    publish(http, 4)
    publish(http, 4)
    other = encode(make_manifest(4).model_copy(update={"created_s": 2.5}), JSON)

    response = http.put("/v1/weights/4", content=other, headers={"Content-Type": JSON})

    assert (response.status_code, response.json()["error"]) == (409, "conflict")


def cannot_be_opened(path: Path) -> None:
    path.symlink_to(path)  # not absent: any look at it fails with ELOOP, as one on a sick disk does with EIO


def cannot_be_read(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("fails", [cannot_be_opened, cannot_be_read])
@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("LATEST", "/v1/weights/latest"),
        ("manifests/4.json", "/v1/weights/latest"),
        ("manifests/4.json", "/v1/weights/4"),
        (f"blobs/{NAME}", f"/v1/weights/blobs/{NAME}"),
    ],
)
def test_a_disk_error_is_503_which_clients_retry(
    file: str, path: str, fails: Callable[[Path], None], http: httpx.Client, tmp_path: Path
) -> None:
    publish(http, 4)
    (tmp_path / "weights" / file).rename(tmp_path / "aside")
    fails(tmp_path / "weights" / file)

    response = http.get(path)

    assert (response.status_code, response.json()["error"]) == (503, "store_unavailable")
    assert "the weight store meets a disk error" in response.json()["detail"]


def test_slow_uploads_leave_the_service_responsive(http: httpx.Client) -> None:
    """More of them than worker threads (40), each with a sender that stops in the middle."""
    sent, goes_on = threading.Semaphore(0), threading.Event()

    def slow_payload() -> Iterator[bytes]:
        yield PAYLOAD[:1]
        sent.release()
        assert goes_on.wait(60)
        yield PAYLOAD[1:]

    def upload(client: httpx.Client) -> int:
        return client.put(f"/v1/weights/blobs/{NAME}", content=slow_payload()).status_code

    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=http.base_url, limits=limits, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(60) as senders,
    ):
        uploads = [senders.submit(upload, client) for _ in range(60)]
        try:
            assert all(sent.acquire(timeout=30) for _ in uploads)
            assert http.get("/v1/run", timeout=20).status_code == 200
        finally:
            goes_on.set()
        assert {upload.result() for upload in uploads} == {204}


def test_long_polls_wait_without_threads_and_all_see_the_version(http: httpx.Client) -> None:
    """More polls than worker threads (40)."""
    answers: list[int] = []

    def poll(client: httpx.Client) -> None:
        answer = client.get("/v1/weights/latest", params={"after": -1, "wait_s": 60}, timeout=90)
        answers.append(answer.json()["version"])

    with httpx.Client(base_url=http.base_url, limits=httpx.Limits(max_connections=100), trust_env=False) as client:
        threads = [threading.Thread(target=poll, args=(client,)) for _ in range(60)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        publish(http, 0)
        for thread in threads:
            thread.join(60)

    assert answers == [0] * 60


def test_long_poll_ends_with_nothing_when_its_time_is_over(http: httpx.Client) -> None:
    publish(http, 2)

    response = http.get("/v1/weights/latest", params={"after": 2, "wait_s": 0.1})

    assert (response.status_code, response.content) == (204, b"")


def test_http_store_downloads_a_payload_whole_or_not_at_all(http: httpx.Client, tmp_path: Path) -> None:
    publish(http, 0)
    client = ServiceClient(str(http.base_url), settings=NO_RETRY)
    store = HttpWeightStore(client)
    path = tmp_path / "download"

    store.download(make_manifest(0).payloads[0], path)

    assert path.read_bytes() == PAYLOAD
    client.close()
