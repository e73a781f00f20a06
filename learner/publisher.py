"""Publication of a version: a safetensors keyframe, the canary's log-probs, and the manifest as the commit."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch

from buffer.errors import Conflict
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload, Probe
from buffer.weights.safetensors import read_header
from buffer.weights.store import WeightStore
from buffer.weights.tensors import HostTensor, checksum
from learner.policy import Policy

CHUNK_BYTES = 1 << 20
PROBE_TOKENS = 32
"""Length of the canary: long enough that a wrong layer shows, short enough to score in one prefill."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A version's bytes and the proof that goes with them. Immutable: the policy may move on while it is sent."""

    keyframe: bytes  # a safetensors file, tied weights once
    probe: Probe


def take_snapshot(policy: Policy, *, dtype: str, tolerance_nats: float) -> Snapshot:
    """Round the weights to `dtype` (float32 or bfloat16), serialise them and score the probe with the rounded ones."""
    rounded = {name: tensor.to(_DTYPES[dtype]).contiguous() for name, tensor in policy.weights().items()}
    token_ids = _probe_tokens(policy)
    ids = torch.tensor(token_ids[None].astype(np.int64), device=policy.model.device)
    with torch.no_grad():
        logits = torch.func.functional_call(
            policy.model,
            {name: tensor.float() for name, tensor in rounded.items()},
            kwargs={"input_ids": ids, "use_cache": False},
        ).logits[0, :-1]  # [N - 1, V]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return Snapshot(
        keyframe=safetensors.torch.save(rounded),
        probe=Probe(token_ids=token_ids, logprobs=logprobs.cpu().numpy(), tolerance=tolerance_nats),
    )


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Bytes in pieces; iterated anew for each attempt to send them."""

    content: bytes

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.content), CHUNK_BYTES):
            yield self.content[start : start + CHUNK_BYTES]


class Publisher:
    """Sends snapshots to the weight store."""

    def __init__(
        self, store: WeightStore, *, run_id: str, model_fingerprint: str, unix_time: Callable[[], float]
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._model_fingerprint = model_fingerprint
        self._unix_time = unix_time

    def latest_version(self) -> PolicyVersion | None:
        """Return the latest published version, None before the first."""
        manifest = self._store.latest()
        return None if manifest is None else manifest.version

    def publish(self, snapshot: Snapshot, *, version: PolicyVersion) -> None:
        """Store the bytes, then commit the version; may be repeated when the answer to an attempt was lost.

        Raises Conflict when the version, or a later one, was published by somebody else.
        """
        sha256 = hashlib.sha256(snapshot.keyframe).hexdigest()
        payload = Payload(kind="keyframe", version=version, sha256=sha256, size_bytes=len(snapshot.keyframe))
        self._store.put_blob(sha256, _Chunks(snapshot.keyframe))
        manifest = Manifest(
            run_id=self._run_id,
            version=version,
            created_s=self._unix_time(),
            model_fingerprint=self._model_fingerprint,
            checksum=_checksum(snapshot.keyframe),
            payloads=(payload,),
            probe=snapshot.probe,
        )
        try:
            self._store.publish(manifest)
        except Conflict:
            if self.latest_version() != version or self._store.manifest(version).payloads != (payload,):
                raise


def _checksum(keyframe: bytes) -> str:
    placed = read_header(keyframe, len(keyframe))
    content = np.frombuffer(keyframe, np.uint8)
    return checksum(
        (tensor.spec, HostTensor(tensor.spec, content[tensor.start : tensor.stop]).digest()) for tensor in placed
    )


def _probe_tokens(policy: Policy) -> np.ndarray:
    """Return the same [N] int32 tokens for every version of a model, spread over its vocabulary."""
    length = min(PROBE_TOKENS, policy.max_positions)
    return np.random.default_rng(0).integers(0, policy.vocab_size, length, dtype=np.int32)
