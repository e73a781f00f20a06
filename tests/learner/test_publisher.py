import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from buffer.errors import Conflict
from buffer.weights.manifest import Probe
from learner.publisher import Publisher, take_snapshot
from tests.learner.builders import make_policy
from tests.learner.stores import ListedStore


def _publisher(store: ListedStore) -> Publisher:
    return Publisher(store, run_id="run", model_fingerprint="f" * 64, unix_time=lambda: 12.0)


@torch.no_grad()
def _score(model: torch.nn.Module, probe: Probe) -> Tensor:
    """The log-probs [N - 1] that an engine would compare with the canary."""
    ids = torch.tensor(probe.token_ids.astype(np.int64))
    logprobs: Tensor = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return torch.stack([logprobs[index, ids[index + 1]] for index in range(len(ids) - 1)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_bytes_load_into_a_fresh_model_that_passes_the_canary(
    model_dir: Path, tmp_path: Path, dtype: str
) -> None:
    policy = make_policy(model_dir)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.2345)
    snapshot = take_snapshot(policy, dtype=dtype, tolerance_nats=0.05)
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(snapshot.keyframe)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    probe = torch.tensor(snapshot.probe.logprobs)
    torch.testing.assert_close(_score(fresh, snapshot.probe), probe, atol=1e-5, rtol=0)
    old = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    assert (_score(old, snapshot.probe) - probe).abs().max() > 0.05


def test_the_probe_scores_the_rounded_weights_not_the_exact_ones(model_dir: Path) -> None:
    policy = make_policy(model_dir)
    exact = take_snapshot(policy, dtype="float32", tolerance_nats=0.05).probe.logprobs
    rounded = take_snapshot(policy, dtype="bfloat16", tolerance_nats=0.05).probe.logprobs

    assert 1e-4 < np.abs(exact - rounded).max() < 1


def test_tied_weights_travel_once(model_dir: Path) -> None:
    tensors = safetensors.torch.load(take_snapshot(make_policy(model_dir), dtype="float32", tolerance_nats=1).keyframe)

    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors


def test_the_blob_is_stored_before_the_manifest_that_names_it(model_dir: Path) -> None:
    store = ListedStore()
    snapshot = take_snapshot(make_policy(model_dir), dtype="float32", tolerance_nats=0.05)

    _publisher(store).publish(snapshot, version=0)

    sha256 = hashlib.sha256(snapshot.keyframe).hexdigest()
    assert store.events == [f"blob {sha256}", "manifest 0"]
    assert b"".join(store.blob(sha256)) == snapshot.keyframe
    manifest = store.manifest(0)
    assert (manifest.run_id, manifest.created_s, manifest.payloads[0].size_bytes) == (
        "run",
        12.0,
        len(snapshot.keyframe),
    )


def test_a_lost_answer_is_no_conflict_but_a_foreign_version_is(model_dir: Path) -> None:
    store = ListedStore()
    policy = make_policy(model_dir)
    publisher = _publisher(store)
    snapshot = take_snapshot(policy, dtype="float32", tolerance_nats=0.05)
    publisher.publish(snapshot, version=3)

    publisher.publish(snapshot, version=3)

    other = take_snapshot(policy, dtype="bfloat16", tolerance_nats=0.05)
    with pytest.raises(Conflict):
        publisher.publish(other, version=3)
    with pytest.raises(Conflict):
        publisher.publish(snapshot, version=2)
