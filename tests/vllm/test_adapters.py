"""LoRA versions in vLLM, in this process and behind HTTP, against the merged weights in transformers."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen2ForCausalLM

from actor.adapters import base_weights, merged
from actor.engine import Completion, GenerationRequest
from actor.settings import VllmSettings
from actor.vllm.engine import VllmEngine
from actor.vllm.fetching import WeightSource
from actor.vllm.remote import RemoteVllmEngine
from actor.weight_sync import check_canary
from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import InvalidSettings
from buffer.fingerprint import model_fingerprint
from buffer.types import VersionSpan
from buffer.weights.manifest import Adapter, Manifest, Payload, Probe
from buffer.weights.mirror import Mirror
from tests.factories import RUN_ID, UNTRUNCATED
from tests.vllm.conftest import make_policies, replay_service, vllm_server

pytestmark = pytest.mark.vllm

ADAPTER = Adapter(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
PROBE_IDS = np.arange(2, 34, dtype=np.int32)
TOLERANCE_NATS = 1e-3


@dataclass(frozen=True, slots=True)
class Adapted:
    """An engine on a base model, and the adapters that are published for it."""

    engine: VllmEngine | RemoteVllmEngine
    store: HttpWeightStore
    base_dir: Path
    models: dict[int, PreTrainedModel]

    def publish(self) -> Manifest:
        """Publish the next version: a random adapter, kept merged in `models`."""
        version = len(self.models)
        torch.manual_seed(100 + version)
        base = base_weights(self.base_dir)
        tensors = {}
        for name, weight in base.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in ADAPTER.target_modules and name.endswith(".weight"):
                out, into = weight.shape
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(ADAPTER.rank, into) * 0.1
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, ADAPTER.rank) * 0.1
        model = Qwen2ForCausalLM.from_pretrained(self.base_dir, dtype=torch.float32).eval()
        model.load_state_dict(merged(base, tensors, ADAPTER, version=version), strict=False)
        self.models[version] = model
        path = self.base_dir / f"adapter-{version}.safetensors"
        save_file(tensors, path)
        content = path.read_bytes()
        payload = Payload(
            kind="keyframe", version=version, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
        )
        self.store.put_blob(payload.sha256, [content])
        probe = Probe(token_ids=PROBE_IDS, logprobs=self.logprobs(PROBE_IDS, version), tolerance=TOLERANCE_NATS)
        manifest = Manifest(
            run_id=RUN_ID,
            version=version,
            created_s=0.0,
            model_fingerprint=model_fingerprint(self.base_dir),
            checksum=Mirror.open(path, version).checksum,
            payloads=(payload,),
            probe=probe,
            adapter=ADAPTER,
        )
        self.store.publish(manifest)
        return manifest

    def take(self, manifest: Manifest) -> None:
        """Bring a version into the engine, proven."""
        self.engine.fetch(manifest)
        self.engine.load(manifest)
        check_canary(self.engine, manifest.probe, version=manifest.version)

    def logprobs(self, token_ids: np.ndarray, version: int) -> np.ndarray:
        """Return transformers' log-probs [N - 1] of token_ids[1:] under a version."""
        ids = torch.from_numpy(token_ids.astype(np.int64))
        with torch.no_grad():
            logits = self.models[version](ids[None]).logits[0, :-1]
        gathered: np.ndarray = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).numpy()
        return gathered

    def assert_drawn_under(self, requests: list[GenerationRequest], drawn: list[Completion], version: int) -> None:
        """Compare every token's log-prob with a recomputation under the one version of its one span."""
        assert len(drawn) == len(requests)
        for request, completion in zip(requests, drawn, strict=True):
            assert completion.spans == (VersionSpan(start=0, end=len(completion.response_ids), version=version),)
            sequence = np.concatenate([request.prompt_ids, completion.response_ids])
            expected = self.logprobs(sequence, version)[len(request.prompt_ids) - 1 :]
            assert np.abs(completion.behavior_logprobs - expected).max() < TOLERANCE_NATS


@pytest.fixture(scope="module", params=["in process", "remote"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    directory = tmp_path_factory.mktemp("adapted")
    base_dir = directory / "base"
    make_policies((base_dir, directory / "unused"), tied=True)
    settings = VllmSettings(dtype="float32", lora_rank=ADAPTER.rank)
    with ExitStack() as stack:
        url = stack.enter_context(replay_service(directory, base_dir, {}))
        client = ServiceClient(url, settings=ClientSettings())
        stack.callback(client.close)
        engine: VllmEngine | RemoteVllmEngine
        if request.param == "remote":
            remote = stack.enter_context(vllm_server(directory, base_dir, settings))
            engine = RemoteVllmEngine(base_dir, remote, sampling=UNTRUNCATED, source=WeightSource(url))
        else:
            engine = VllmEngine(base_dir, settings, sampling=UNTRUNCATED, seed=7, source=WeightSource(url))
        yield Adapted(engine, HttpWeightStore(client), base_dir, {})


def requests_for(*, num: int, max_new_tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_ids=np.array([2 + i, 11, 7], np.int32), sampling=UNTRUNCATED, max_new_tokens=max_new_tokens
        )
        for i in range(num)
    ]


def test_each_adapter_version_draws_with_the_logprobs_of_its_merged_weights(adapted: Adapted) -> None:
    requests = requests_for(num=8, max_new_tokens=24)

    for _ in range(3):
        manifest = adapted.publish()
        adapted.take(manifest)

        assert adapted.engine.version == manifest.version
        adapted.assert_drawn_under(requests, adapted.engine.generate(requests), manifest.version)


def test_responses_end_under_the_adapter_that_they_began_with(adapted: Adapted) -> None:
    before = adapted.publish()
    adapted.take(before)
    requests = requests_for(num=16, max_new_tokens=100)
    drawn: list[Completion] = []
    generator = threading.Thread(target=lambda: drawn.extend(adapted.engine.generate(requests)))

    generator.start()
    while generator.is_alive():
        after = adapted.publish()
        adapted.take(after)
    generator.join()

    versions = {span.version for completion in drawn for span in completion.spans}
    assert len(versions) == 1
    adapted.assert_drawn_under(requests, drawn, int(versions.pop() or 0))
    adapted.assert_drawn_under(requests, adapted.engine.generate(requests), after.version)


def test_whole_weights_are_refused_by_an_engine_for_adapters(adapted: Adapted) -> None:
    manifest = adapted.publish().model_copy(update={"adapter": None})

    with pytest.raises(InvalidSettings, match=r"is whole weights, vLLM was started with lora_rank = 4"):
        adapted.engine.fetch(manifest)
