"""docker/nginx-weights.conf in a real nginx between actors and a real service."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from buffer.client import HttpWeightStore
from buffer.connection import ServiceClient
from buffer.wire import JSON, encode
from services.context import ServiceContext, ServiceSettings
from services.security import TokenSettings
from tests.factories import make_manifest
from tests.nginx.running import free_port, running_nginx
from tests.services.live import make_context, serving

CONF = Path(__file__).parents[2] / "docker" / "nginx-weights.conf"
PAYLOAD = os.urandom(3 << 20)
NAME = sha256(PAYLOAD).hexdigest()
BLOB = f"/v1/weights/blobs/{NAME}"
TOKENS = TokenSettings(
    act=(SecretStr("an-actor's"),), learn=(SecretStr("a-learner's"),), read=(SecretStr("a-reader's"),)
)


@contextmanager
def nginx(origin: str, directory: Path) -> Iterator[str]:
    """Run the shipped configuration, its two addresses replaced, in a directory of its own."""
    port = free_port()
    conf = CONF.read_text()
    for address, real in (("127.0.0.1:8642", origin.removeprefix("http://")), ("127.0.0.1:8643", f"127.0.0.1:{port}")):
        assert address in conf
        conf = conf.replace(address, real)
    with running_nginx(conf, directory, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def context(tmp_path: Path) -> ServiceContext:
    return make_context(tmp_path, settings=ServiceSettings(tokens=TOKENS))


@pytest.fixture
def cache(context: ServiceContext, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "nginx").mkdir()
    with serving(context) as origin:
        manifest = make_manifest(0, payload=PAYLOAD)
        learner = httpx.Client(base_url=origin, headers={"Authorization": "Bearer a-learner's"}, trust_env=False)
        with learner, nginx(origin, tmp_path / "nginx") as url:
            assert learner.put(BLOB, content=PAYLOAD).status_code == 204
            put = learner.put("/v1/weights/0", content=encode(manifest, JSON), headers={"Content-Type": JSON})
            assert put.status_code == 204
            yield url


def test_a_cached_payload_needs_a_token_and_no_byte_of_the_service(cache: str, tmp_path: Path) -> None:
    actor = httpx.Client(base_url=cache, headers={"Authorization": "Bearer an-actor's"}, trust_env=False)
    stranger = httpx.Client(base_url=cache, trust_env=False)
    with actor, stranger:
        before = stranger.get(BLOB).status_code
        first, second = actor.get(BLOB), actor.get(BLOB)
        (tmp_path / "weights" / "blobs" / NAME).unlink()  # the service cannot send it any more

        hit = actor.get(BLOB, headers={"Range": "bytes=100-2000099"})
        refused = {
            name: stranger.get(BLOB, headers=headers).status_code
            for name, headers in (
                ("no token", {}),
                ("unknown token", {"Authorization": "Bearer guessed-guessed"}),
                ("a reader", {"Authorization": "Bearer a-reader's"}),
                ("no token, a range", {"Range": "bytes=0-9"}),
            )
        }

    assert before == 401
    assert (first.content, second.content) == (PAYLOAD, PAYLOAD)
    assert [answer.headers["x-cache"] for answer in (first, second, hit)] == ["MISS", "HIT", "HIT"]
    assert (hit.status_code, hit.content) == (206, PAYLOAD[100:2000100])
    assert first.headers["etag"] == f'"{NAME}"'
    assert refused == {"no token": 401, "unknown token": 401, "a reader": 403, "no token, a range": 401}


def test_a_client_works_through_the_cache_as_without_it(cache: str, tmp_path: Path) -> None:
    client = ServiceClient(cache, token="an-actor's")
    store = HttpWeightStore(client)

    manifest = store.latest(wait_s=1)
    assert manifest is not None
    store.download(manifest.payloads[0], tmp_path / "payload")
    client.close()

    assert (tmp_path / "payload").read_bytes() == PAYLOAD


def test_uploads_go_past_the_cache(cache: str) -> None:
    answer = httpx.put(
        f"{cache}{BLOB}", content=b"small", headers={"Authorization": "Bearer a-learner's"}, trust_env=False
    )

    assert answer.status_code == 403
