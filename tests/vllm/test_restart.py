"""A vLLM server that is started again holds random weights: nothing drawn under them is taken for a version."""

import time
from pathlib import Path

import numpy as np
import pytest

from actor.engine import Completion, GenerationRequest
from actor.settings import VllmSettings
from actor.vllm.fetching import WeightSource
from actor.vllm.remote import RemoteVllmEngine
from actor.weight_sync import check_canary
from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import CorruptWeights, EngineUnreachable
from tests.factories import UNTRUNCATED
from tests.vllm.conftest import Served, free_port, make_policies, replay_service, vllm_server

pytestmark = pytest.mark.vllm


def generate_when_it_answers(engine: RemoteVllmEngine) -> list[Completion]:
    """Generate once the server has come up."""
    request = GenerationRequest(prompt_ids=np.array([2, 11, 7], np.int32), sampling=UNTRUNCATED, max_new_tokens=8)
    while True:
        try:
            return engine.generate([request])
        except EngineUnreachable:
            time.sleep(0.2)


def test_a_server_that_was_started_again_is_found_out_and_gets_the_version_again(tmp_path: Path) -> None:
    policies = make_policies((tmp_path / "policy0", tmp_path / "policy1"), tied=True)
    model_dir, settings, port = policies.directories[0], VllmSettings(dtype="float32"), free_port()
    with replay_service(tmp_path, model_dir, {}) as url:
        client = ServiceClient(url, settings=ClientSettings())
        with vllm_server(tmp_path, model_dir, settings, port=port) as remote:
            engine = RemoteVllmEngine(model_dir, remote, sampling=UNTRUNCATED, source=WeightSource(url))
            served = Served(engine, HttpWeightStore(client), policies, tmp_path)
            manifest = served.publish(parity=0)
            served.take(manifest)
            generate_when_it_answers(engine)

        with vllm_server(tmp_path, model_dir, settings, port=port):
            with pytest.raises(CorruptWeights, match="drew tokens under weights that it calls 'default'"):
                generate_when_it_answers(engine)
            assert engine.version == -1

            served.take(manifest)

            check_canary(engine, manifest.probe, version=manifest.version)
            (drawn,) = generate_when_it_answers(engine)
            assert {span.version for span in drawn.spans} == {manifest.version}
        client.close()
