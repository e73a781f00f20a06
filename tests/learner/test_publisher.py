import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from buffer.errors import Conflict, StoreUnavailable
from buffer.weights.manifest import Probe
from buffer.weights.mirror import Mirror
from buffer.weights.plan import cheapest_path
from learner.attention import packed_attention
from learner.collate import collate
from learner.policy import Policy
from learner.settings import ComputeSettings
from learner.snapshot import Snapshot, take_snapshot
from tests.learner.builders import make_policy, plain_samples
from tests.learner.stores import ListedStore, keyframe_of, publisher_to


def _snapshot(policy: Policy, dtype: str = "bfloat16") -> Snapshot:
    return take_snapshot(policy, dtype=dtype, tolerance_nats=0.05)


@torch.no_grad()
def _step(policy: Policy, share: float = 0.01) -> None:
    """Move some of the weights, as an update would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        parameter *= 1 + 0.01 * (torch.rand(parameter.shape, generator=generator) < share)


@torch.no_grad()
def _score(model: torch.nn.Module, probe: Probe) -> Tensor:
    """The log-probs [N - 1] that an engine would compare with the canary."""
    ids = torch.tensor(probe.token_ids.astype(np.int64))
    logprobs: Tensor = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return torch.stack([logprobs[index, ids[index + 1]] for index in range(len(ids) - 1)])


def _follow(store: ListedStore, mirror: Mirror | None, path: Path, version: int) -> Mirror:
    """Bring an actor's mirror to a version, the cheapest way."""
    manifest = store.manifest(version)
    for step in cheapest_path(manifest, None if mirror is None else mirror.version):
        blobs = [b"".join(store.blob(part.sha256)) for part in step.parts]
        if step.base_version is None:
            path.write_bytes(blobs[0])
            mirror = Mirror.open(path, step.version)
        else:
            assert mirror is not None
            mirror.apply([[blob] for blob in blobs], base_version=step.base_version, version=step.version)
    assert mirror is not None
    assert (mirror.version, mirror.checksum) == (version, manifest.checksum)
    return mirror


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_bytes_load_into_a_fresh_model_that_passes_the_canary(
    model_dir: Path, tmp_path: Path, dtype: str
) -> None:
    policy = make_policy(model_dir)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.2345)
    snapshot = _snapshot(policy, dtype)
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(keyframe_of(snapshot))

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    probe = torch.tensor(snapshot.probe.logprobs)
    torch.testing.assert_close(_score(fresh, snapshot.probe), probe, atol=1e-5, rtol=0)
    old = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    assert (_score(old, snapshot.probe) - probe).abs().max() > 0.05


def test_the_probe_scores_the_rounded_weights_and_leaves_the_exact_ones_as_they_were(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    before = {name: tensor.clone() for name, tensor in policy.weights().items()}

    exact = _snapshot(policy, "float32").probe.logprobs
    rounded = _snapshot(policy, "bfloat16").probe.logprobs

    assert 1e-4 < np.abs(exact - rounded).max() < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights().items())


def test_the_probe_does_not_run_an_attention_that_refuses_float32(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_flash_attn(module: torch.nn.Module, query: Tensor, *others: Any, **more: Any) -> tuple[Tensor, None]:
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only supports fp16 and bf16")
        return packed_attention(module, query, *others, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, "half_precision_alone", like_flash_attn)
    policy = make_policy(model_dir, compute=ComputeSettings(dtype="bfloat16"))
    expected = _snapshot(policy).probe.logprobs
    policy.model.set_attn_implementation("half_precision_alone")

    probe = _snapshot(policy).probe

    np.testing.assert_array_equal(probe.logprobs, expected)
    assert policy.model.config._attn_implementation == "half_precision_alone"  # again, for updates
    assert policy.forward(collate(plain_samples(0), clock=0), frozenset()).scores.logprobs.isfinite().all()


def test_tied_weights_travel_once(model_dir: Path) -> None:
    tensors = safetensors.torch.load(keyframe_of(_snapshot(make_policy(model_dir), "float32")))

    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors


def test_blobs_are_stored_before_the_manifest_that_names_them(model_dir: Path) -> None:
    store, policy = ListedStore(), make_policy(model_dir)
    publisher = publisher_to(store)

    publisher.begin(_snapshot(policy), version=0)
    _step(policy)
    publisher.begin(_snapshot(policy), version=1)
    publisher.flush()

    keyframe, delta = store.manifest(1).payloads
    assert store.events == [f"blob {keyframe.sha256}", "manifest 0", f"blob {delta.sha256}", "manifest 1"]
    assert (keyframe.kind, delta.kind, delta.base_version) == ("keyframe", "delta", 0)
    assert delta.size_bytes < keyframe.size_bytes / 3
    assert (store.manifest(1).run_id, store.manifest(1).created_s) == ("run", 12.0)
    assert publisher.sent is not None
    assert (publisher.sent.version, publisher.sent.payload_bytes) == (1, delta.size_bytes)


def test_whoever_follows_or_joins_late_or_misses_versions_ends_with_the_learner_s_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    store, policy = ListedStore(), make_policy(model_dir)
    publisher = publisher_to(store, keyframe_every=4)
    follower: Mirror | None = None
    sleeper: Mirror | None = None
    for version in range(0, 20, 2):  # versions have gaps
        publisher.begin(_snapshot(policy), version=version)
        publisher.flush()
        follower = _follow(store, follower, tmp_path / "follower", version)
        if version % 6 == 0:
            sleeper = _follow(store, sleeper, tmp_path / "sleeper", version)
        joiner = _follow(store, None, tmp_path / "joiner", version)
        assert bytes(b"".join(follower.keyframe())) == keyframe_of(_snapshot(policy))
        assert joiner.checksum == follower.checksum
        _step(policy)

    kinds = [[p.kind for p in store.manifest(v).payloads if p.version == v] for v in range(0, 20, 2)]
    assert kinds == [
        ["keyframe"],
        *[["delta"]] * 3,
        ["delta", "keyframe"],
        *[["delta"]] * 3,
        ["delta", "keyframe"],
        ["delta"],
    ]


def test_a_delta_that_saves_nothing_is_a_keyframe(model_dir: Path) -> None:
    store, policy = ListedStore(), make_policy(model_dir)
    publisher = publisher_to(store)
    publisher.begin(_snapshot(policy), version=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 10 ** (40 * torch.rand(parameter.shape) - 20))

    publisher.begin(_snapshot(policy), version=1)

    assert [payload.kind for payload in store.manifest(1).payloads] == ["keyframe"]


def test_a_version_that_somebody_else_published_is_a_conflict(model_dir: Path) -> None:
    store, policy = ListedStore(), make_policy(model_dir)
    first = publisher_to(store)
    first.begin(_snapshot(policy), version=3)
    first.flush()

    other = publisher_to(store)
    other.begin(_snapshot(policy, "float32"), version=3)
    with pytest.raises(Conflict):
        other.flush()
    late = publisher_to(store)
    late.begin(_snapshot(policy), version=2)
    with pytest.raises(Conflict):
        late.flush()


class GatedStore(ListedStore):
    """Holds every blob back until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        assert self.gate.wait(30)
        super().put_blob(sha256, chunks)


def test_the_policy_may_move_on_while_its_version_is_sent(model_dir: Path, tmp_path: Path) -> None:
    store, policy = GatedStore(), make_policy(model_dir)
    expected = keyframe_of(_snapshot(policy))
    with ThreadPoolExecutor(1) as executor:
        publisher = publisher_to(store, executor=executor)

        publisher.begin(_snapshot(policy), version=0)
        idle_at_once = publisher.idle
        _step(policy)
        assert store.manifests == {}
        store.gate.set()
        publisher.flush()

    assert (idle_at_once, publisher.idle) == (False, True)
    assert b"".join(_follow(store, None, tmp_path / "mirror", 0).keyframe()) == expected


def test_after_a_version_that_could_not_be_sent_comes_a_keyframe(model_dir: Path) -> None:
    class Refusing(ListedStore):
        refusals: Callable[[], bool]

        def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
            if self.refusals():
                raise StoreUnavailable("the disk is full")
            super().put_blob(sha256, chunks)

    store, policy = Refusing(), make_policy(model_dir)
    refuse = iter([False, True, False])
    store.refusals = lambda: next(refuse)
    publisher = publisher_to(store)
    publisher.begin(_snapshot(policy), version=0)
    _step(policy)
    publisher.begin(_snapshot(policy), version=1)

    with pytest.raises(StoreUnavailable):
        publisher.flush()
    publisher.begin(_snapshot(policy), version=2)
    publisher.flush()

    assert [payload.kind for payload in store.manifest(2).payloads] == ["keyframe"]
