"""A learner's side of the weight store, for the actor's tests."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from actor.torch_engine import TorchEngine
from buffer.fingerprint import model_fingerprint
from buffer.types import PolicyVersion
from buffer.weights.manifest import Adapter, Manifest, Payload, Probe
from buffer.weights.mirror import Mirror
from buffer.weights.store import WeightStore
from tests.factories import RUN_ID

PROBE_IDS = np.array([2, 9, 4, 7, 5, 3, 11, 8], np.int32)


class WrongEngine(TorchEngine):
    """An engine that silently loads another file than it was given, as often as it is told."""

    wrong_file: Path
    wrong_loads = 0

    def load(self, weights: Path, version: PolicyVersion, *, adapter: Adapter | None = None) -> None:
        self.wrong_loads -= 1
        super().load(weights if self.wrong_loads < 0 else self.wrong_file, version, adapter=adapter)


def publish(store: WeightStore, model_dir: Path, keyframe: Path, version: int, *, run_id: str = RUN_ID) -> None:
    """Publish a keyframe with the log-probs that its weights really give the probe."""
    engine, content = TorchEngine(model_dir, seed=0), keyframe.read_bytes()
    engine.load(keyframe, version)
    payload = Payload(
        kind="keyframe", version=version, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )
    store.put_blob(payload.sha256, [content])
    store.publish(
        Manifest(
            run_id=run_id,
            version=version,
            created_s=0.0,
            model_fingerprint=model_fingerprint(model_dir),
            checksum=Mirror.open(keyframe, version).checksum,
            payloads=(payload,),
            probe=Probe(token_ids=PROBE_IDS, logprobs=engine.score(PROBE_IDS), tolerance=1e-3),
        )
    )


def wait_until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for something that another thread brings about; fail when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
