"""A real service whose weights are in real object storage."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from buffer.client import HttpWeightStore, ServiceClient
from buffer.weights import download
from tests.factories import make_manifest
from tests.object_storage import BUCKET, CREDENTIALS
from tests.services.live import NO_RETRY, ServeProcess, stalewise

PAYLOAD = random.Random(0).randbytes(9_000_000)
NAME = sha256(PAYLOAD).hexdigest()


@pytest.fixture
def serve(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServeProcess]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = f"weights.store=s3://{BUCKET}/{uuid4().hex}"
    process = ServeProcess(tmp_path, store, f"weights.s3_endpoint={s3_url}")
    yield process
    process.stop()


def test_versions_outlive_a_kill_of_the_service_and_come_in_ranges(
    serve: ServeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RANGE_BYTES", 4_000_001)
    manifest = make_manifest(3, payload=PAYLOAD)
    with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
        HttpWeightStore(client).put_blob(NAME, [PAYLOAD[:5_000_000], PAYLOAD[5_000_000:]])
        HttpWeightStore(client).publish(manifest)
    os.kill(serve.process.pid, signal.SIGKILL)
    serve.restart()

    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=NO_RETRY)) as client:
        latest = HttpWeightStore(client).latest(after=2)
        assert latest is not None
        HttpWeightStore(client).download(latest.payloads[0], tmp_path / "payload")
        stats = client.stats()
    with httpx.Client(base_url=f"{url}/v1/weights/blobs", trust_env=False) as http:
        part = http.get(NAME, headers={"Range": "bytes=-7", "If-Range": f'"{NAME}"'})
        unchanged = http.get(NAME, headers={"If-None-Match": f'"{NAME}"'})
        absent = http.get("0" * 64)

    assert (tmp_path / "payload").read_bytes() == PAYLOAD
    assert (stats["weights"]["latest_version"], stats["weights"]["bytes"]) == (3, len(PAYLOAD))
    assert (part.status_code, part.content, part.headers["etag"]) == (206, PAYLOAD[-7:], f'"{NAME}"')
    assert part.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert (unchanged.status_code, absent.status_code) == (304, 404)
    assert not (serve.directory / "weights").exists()
    log = serve.log_path.read_text()
    assert not any(secret in log for secret in CREDENTIALS.values())


def test_a_bucket_that_cannot_be_had_ends_the_start_with_a_sentence(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings = [
        f"run.runs_dir={tmp_path}",
        "service.port=0",
        "weights.store=s3://absent",
        f"weights.s3_endpoint={s3_url}",
    ]

    done = stalewise("serve", *(part for setting in settings for part in ("--set", setting)))

    last = done.stderr.splitlines()[-1]
    assert last == (
        "stalewise: s3://absent/run cannot be used: the bucket does not exist (create it, or set weights.store)"
    )
    assert done.returncode == 3
