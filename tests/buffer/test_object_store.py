"""What only the weight store in object storage has: a bucket that may be away, and a sentence for each reason."""

from collections.abc import Callable
from uuid import uuid4

import httpx
import pytest

from buffer.errors import StoreUnavailable
from buffer.weights.object_store import ObjectWeightStore
from buffer.weights.store import WeightStoreSettings
from tests.factories import PAYLOAD, RUN_ID, make_manifest
from tests.object_storage import BUCKET, CREDENTIALS


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def opened(endpoint: str, where: str) -> ObjectWeightStore:
    settings = WeightStoreSettings(store=f"s3://{where}", s3_endpoint=endpoint, s3_timeout_s=0.2)
    return ObjectWeightStore(RUN_ID, settings=settings)


def test_runs_share_a_bucket_and_a_prefix_without_meeting(s3_url: str) -> None:
    settings = WeightStoreSettings(store=f"s3://{BUCKET}/{uuid4().hex}", s3_endpoint=s3_url)
    one, other = ObjectWeightStore("one", settings=settings), ObjectWeightStore("other", settings=settings)
    manifest = make_manifest(0)
    one.put_blob(manifest.payloads[0].sha256, [PAYLOAD])

    one.publish(manifest)

    assert (one.latest_version(), other.latest_version()) == (0, -1)
    assert one.location == f"{settings.store}/one"


def test_a_bucket_that_does_not_exist_is_a_sentence(s3_url: str) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        opened(s3_url, "no-such-bucket/x").latest()

    assert caught.value.detail == f"s3://no-such-bucket/x/{RUN_ID} cannot be used: the bucket does not exist"


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.latest(),
        lambda store: store.put_blob("0" * 64, [b"x"]),
        lambda store: store.blob_bytes("0" * 64),
        lambda store: list(store.blob_range("0" * 64, 0, 4)),
    ],
)
def test_storage_that_is_away_is_a_sentence_without_secrets(ask: Callable[[ObjectWeightStore], object]) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        ask(opened("http://127.0.0.1:1", f"{BUCKET}/x"))

    where = f"s3://{BUCKET}/x/{RUN_ID} at http://127.0.0.1:1"
    assert caught.value.detail == f"{where} cannot be used: HTTP error: error sending request"
    assert not any(secret in str(caught.value) for secret in CREDENTIALS.values())


def test_a_damaged_index_is_a_sentence(s3_url: str) -> None:
    prefix = uuid4().hex
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=a-key/20200101/us-east-1/s3/aws4_request"}
    url = f"{s3_url}/{BUCKET}/{prefix}/{RUN_ID}/INDEX"
    httpx.put(url, content=b"{", headers=signed, trust_env=False).raise_for_status()

    with pytest.raises(StoreUnavailable, match=f"{prefix}/{RUN_ID}/INDEX is damaged"):
        opened(s3_url, f"{BUCKET}/{prefix}").latest_version()
