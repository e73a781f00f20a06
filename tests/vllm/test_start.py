"""What the vLLM engine refuses before it starts, in one sentence, and what its actor imports."""

import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from actor.engine import GenerationRequest
from actor.settings import VllmSettings
from actor.vllm.engine import VllmEngine
from actor.vllm.fetching import WeightSource
from actor.vllm.plugin import SUPPORTED, check_version
from actor.vllm.remote import RemoteVllmEngine
from actor.vllm.sampling import Limits, check_sampling
from buffer.errors import EngineUnreachable, InvalidSettings
from buffer.types import SamplingSettings
from tests.factories import UNTRUNCATED
from tests.vllm.conftest import free_port, make_policies

NOWHERE = WeightSource("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p", "message"),
    [
        (1.0, 0.9, 0, 0.0, "set top_k between 1 and 64 as well"),
        (1.0, 1.0, 0, 0.1, "set top_k between 1 and 64 as well"),
        (1.0, 1.0, 65, 0.0, "top_k=65"),
        (0.001, 1.0, 0, 0.0, "temperature=0.001 is below 0.01"),
    ],
)
def test_sampling_whose_logprobs_vllm_cannot_report_is_refused(
    temperature: float, top_p: float, top_k: int, min_p: float, message: str
) -> None:
    with pytest.raises(InvalidSettings, match=message):
        check_sampling(SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p))


def test_vllm_is_told_every_end_token() -> None:
    request = GenerationRequest(prompt_ids=np.array([2], np.int32), sampling=UNTRUNCATED, max_new_tokens=4)

    params = Limits(vocab_size=100, max_model_tokens=10, end_ids=(1, 7)).sampling_params(request)

    assert params["stop_token_ids"] == [1, 7]


def test_a_response_whose_kept_ids_are_not_all_there_is_left_out_instead_of_ending_the_actor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = Limits(vocab_size=100, max_model_tokens=10, end_ids=(1,))
    top_2 = SamplingSettings(temperature=1.0, top_p=1.0, top_k=2, min_p=0.0)
    plain = [(7, -0.1), (3, -2.0), (4, -9999.0)]
    tied = [(7, -0.1), *((id_, -2.0) for id_ in range(10, 19))]  # all 10 that were asked for

    kept, torn = limits.kept(top_2, [plain, plain]), limits.kept(top_2, [plain, tied])

    assert kept.ids is not None
    assert kept.counts is not None
    assert (kept.ids.tolist(), kept.counts.tolist()) == ([3, 7, 3, 7], [2, 2])
    assert [of.finish_reason("stop") for of in (kept, torn, limits.kept(UNTRUNCATED, []))] == ["stop", "abort", "stop"]
    assert limits.incomplete_total == 1
    assert "1 responses so far are left out with their groups: 8 ids or more tie" in caplog.text


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"holds no config\.json"):
        VllmEngine(tmp_path, VllmSettings(), sampling=UNTRUNCATED, seed=0, source=NOWHERE)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_sentence_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(InvalidSettings, match=r"pip install '\.\[vllm\]'.*make setup-vllm"):
        VllmEngine(tmp_path, VllmSettings(), sampling=UNTRUNCATED, seed=0, source=NOWHERE)


def test_the_supported_releases_are_those_that_the_extra_installs() -> None:
    (first, after) = (".".join(map(str, release)) for release in SUPPORTED)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert project["optional-dependencies"]["vllm"] == [f"vllm>={first},<{after}"]
    check_version("0.32.0")
    check_version("0.33.1+cpu")
    for other in ("0.31.2", "0.34.0", "1.0.0"):
        with pytest.raises(InvalidSettings, match=r"install a release from 0\.32 up to, not including, 0\.34"):
            check_version(other)


def test_a_server_that_does_not_answer_is_waited_for_and_named(tmp_path: Path) -> None:
    make_policies((tmp_path, tmp_path / "other"), tied=True)
    settings = VllmSettings(url=f"http://127.0.0.1:{free_port()}", start_timeout_s=0.3)

    with pytest.raises(EngineUnreachable, match="no answer from the vLLM server"):
        RemoteVllmEngine(tmp_path, settings, sampling=UNTRUNCATED, source=NOWHERE)


@pytest.mark.vllm
def test_heads_that_the_cpu_build_does_not_know_are_refused_at_start(tmp_path: Path) -> None:
    make_policies((tmp_path, tmp_path / "other"), tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))

    with pytest.raises(InvalidSettings, match="heads are 16 wide"):
        VllmEngine(tmp_path, VllmSettings(dtype="float32"), sampling=UNTRUNCATED, seed=0, source=NOWHERE)


@pytest.mark.vllm
def test_stalewise_act_imports_neither_the_learner_nor_a_server() -> None:
    program = """
import sys
import services.cli, services.actor_service
import actor.vllm.engine, actor.vllm.remote
settings = ("learner", "learner.settings")  # a run's settings are one record
bad = [m for m in sys.modules if m.split(".")[0] in ("learner", "fastapi", "uvicorn") and m not in settings]
sys.exit(f"imported: {bad}" if bad else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
