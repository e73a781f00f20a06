"""vLLM in this process and behind HTTP, two sets of weights for each model, and transformers to compare with."""

import hashlib
import itertools
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from actor.engine import Completion
from actor.settings import VllmSettings
from actor.vllm.engine import VllmEngine
from actor.vllm.fetching import WeightSource
from actor.vllm.remote import RemoteVllmEngine
from actor.vllm.server import server_command, server_environment
from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.types import PolicyVersion, Trajectory
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.mirror import Mirror
from services.address import read_address
from tests.actor.publishing import publish, wait_until
from tests.deltas import delta_between
from tests.factories import RUN_ID, UNTRUNCATED

MAX_MODEL_TOKENS = 128
VOCABULARY = 48
END_IDS = (1, 38)
"""The tokenizer's end token, and one that generation_config.json alone names."""
SERVICE_PYTHON = Path(__file__).parents[2] / ".venv/bin/python"
TOKEN = "the-token-of-the-tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs vLLM where there is none; vLLM's own warnings are not ours to fix."""
    absent = pytest.mark.skip(reason="vLLM is not installed here: run `make test-vllm`")
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(600))
            if find_spec("vllm") is None:
                item.add_marker(absent)


@dataclass(frozen=True, slots=True)
class Policies:
    """Two sets of weights of one model; version v has the weights v % 2."""

    models: tuple[PreTrainedModel, PreTrainedModel]
    directories: tuple[Path, Path]

    def file(self, version: int) -> Path:
        """Return the safetensors file of a version."""
        return self.directories[version % 2] / "model.safetensors"

    def logits(self, token_ids: npt.NDArray[np.int32], version: int) -> torch.Tensor:
        """Return transformers' logits [N, V] for a sequence under a version."""
        with torch.no_grad():
            logits: torch.Tensor = self.models[version % 2](torch.from_numpy(token_ids.astype(np.int64))[None]).logits
        return logits[0]

    def recompute(
        self, prompt_ids: npt.NDArray[np.int32], drawn: Completion | Trajectory, temperature: float
    ) -> npt.NDArray[np.float32]:
        """Return each response token's log-prob [T] under the version that its span names, over the kept ids."""
        sequence = np.concatenate([prompt_ids, drawn.response_ids])
        logprobs = np.zeros(len(drawn.response_ids), np.float32)
        for span in drawn.spans:
            assert span.version is not None
            logits = self.logits(sequence, span.version)[len(prompt_ids) - 1 : -1] / temperature
            for position in range(span.start, span.end):
                kept = kept_at(drawn, position)
                support = logits[position] if kept is None else logits[position][kept]
                logprobs[position] = logits[position, drawn.response_ids[position]] - support.logsumexp(-1)
        return logprobs


@dataclass(frozen=True, slots=True)
class Served:
    """An engine, the store that its workers fetch from, and the policies that are published there."""

    engine: VllmEngine | RemoteVllmEngine
    store: HttpWeightStore
    policies: Policies
    directory: Path
    versions: Iterator[PolicyVersion] = field(default_factory=itertools.count)

    def publish(self, file: Path | None = None, *, parity: int) -> Manifest:
        """Publish the next version with the weights of this parity, or of a file; skip a number where need be."""
        version = next(v for v in self.versions if v % 2 == parity)
        publish(self.store, self.policies.directories[0], file or self.policies.file(version), version)
        return self.store.manifest(version)

    def publish_delta(self, base: Manifest, *, parity: int) -> Manifest:
        """Publish the next version of this parity, reached over the keyframe of a version and a delta from there."""
        proven, version = self.publish(parity=parity), next(v for v in self.versions if v % 2 == parity)
        before, after = (Mirror.open(self.policies.file(v), v) for v in (base.version, version))
        content = b"".join(delta_between(before.tensors, after.tensors, base_version=base.version, version=version))
        delta = Payload(
            kind="delta",
            version=version,
            base_version=base.version,
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
        )
        self.store.put_blob(delta.sha256, [content])
        payloads = (*base.payloads, delta)
        manifest = proven.model_copy(update={"version": version, "payloads": payloads})
        self.store.publish(manifest)
        return manifest

    def forget(self, payload: Payload) -> None:
        """Delete a payload from the service's disk."""
        (self.directory / RUN_ID / "weights/blobs" / payload.sha256).unlink()

    def publish_unproven(self, file: Path) -> Manifest:
        """Publish a file that need not be a version of this model, with the probe of another version."""
        proven, content, version = self.publish(parity=1), file.read_bytes(), next(self.versions)
        payload = Payload(
            kind="keyframe", version=version, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
        )
        self.store.put_blob(payload.sha256, [content])
        checksum = Mirror.open(file, version).checksum
        update = {"version": version, "payloads": (payload,), "checksum": checksum}
        self.store.publish(proven.model_copy(update=update))
        manifest = self.store.latest()
        assert manifest is not None
        return manifest

    def flip_a_bit(self, manifest: Manifest) -> None:
        """Damage the payload of a version on the service's disk."""
        path = self.directory / RUN_ID / "weights/blobs" / manifest.payloads[0].sha256
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def load(self, parity: int) -> PolicyVersion:
        """Publish the weights of this parity, and bring them into the engine."""
        manifest = self.publish(parity=parity)
        self.take(manifest)
        return manifest.version

    def take(self, manifest: Manifest) -> None:
        """Bring a version into the engine."""
        self.engine.fetch(manifest)
        self.engine.load(manifest)


def kept_at(drawn: Completion | Trajectory, position: int) -> list[int] | None:
    """Return the ids that truncated sampling kept for one token; None when nothing was cut."""
    if drawn.kept_token_ids is None or drawn.kept_token_counts is None:
        return None
    end = int(drawn.kept_token_counts[: position + 1].sum())
    ids: list[int] = drawn.kept_token_ids[end - drawn.kept_token_counts[position] : end].tolist()
    return ids


def make_policies(directories: tuple[Path, Path], *, tied: bool) -> Policies:
    """Make two Qwen2 models with large random weights and biases, so that a wrong layer shows in nats."""
    torch.set_num_threads(1)
    first, second = (_make_model(directory, tied=tied, seed=seed) for seed, directory in enumerate(directories))
    return Policies((first, second), directories)


def _make_model(directory: Path, *, tied: bool, seed: int) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # 32 wide: the smallest head that vLLM's CPU build knows
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_TOKENS,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=END_IDS[0],
        initializer_range=0.3,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = list(END_IDS)
    model.save_pretrained(directory)
    words = ["<bos>", "<eos>", *"0123456789=", *(f"word{i}" for i in range(VOCABULARY - 13))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<bos>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return model


@contextmanager
def started(command: list[str], log_path: Path, *, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Run a command in the background; at the end it is asked to stop."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield
    finally:
        process.terminate()
        code = process.wait(120)
    assert code == 0, log_path.read_text()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def cli(python: Path, *arguments: str) -> list[str]:
    """Return the command that runs `stalewise` in an environment."""
    return [str(python), "-m", "services.cli", *arguments]


def options_of(settings: dict[str, Any]) -> list[str]:
    """Return settings as command-line options."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@contextmanager
def replay_service(directory: Path, model_dir: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Run `stalewise serve` from the default environment; return its address."""
    fixed = {"run.name": RUN_ID, "run.runs_dir": directory, "run.model": model_dir, "service.port": 0}
    command = cli(SERVICE_PYTHON, "serve", *options_of(fixed | settings))
    with started(command, directory / "service.log"):
        wait_until(lambda: read_address(directory / RUN_ID) is not None, timeout_s=120)
        url = read_address(directory / RUN_ID)
        assert url is not None
        yield url


@contextmanager
def vllm_server(
    directory: Path, model_dir: Path, settings: VllmSettings, *, port: int | None = None
) -> Iterator[VllmSettings]:
    """Run a vLLM server from this environment; return the settings of an engine that talks to it."""
    port = port or free_port()
    command = server_command(model_dir, settings, host="127.0.0.1", port=port, seed=11)
    with started(command, directory / "vllm.log", environment=server_environment(settings)):
        yield settings.model_copy(update={"url": f"http://127.0.0.1:{port}"})


@pytest.fixture(scope="session", params=["tied", "untied", "remote"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start vLLM, in this process or behind HTTP, on a directory without weights; any version can be loaded."""
    directory = tmp_path_factory.mktemp(request.param)
    policies = make_policies((directory / "policy0", directory / "policy1"), tied=request.param != "untied")
    without_weights = directory / "config"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(policies.directories[0], without_weights, ignore=ignored)
    settings = VllmSettings(dtype="float32")
    with ExitStack() as stack:
        url = stack.enter_context(replay_service(directory, without_weights, {"service.tokens.admin": TOKEN}))
        client = ServiceClient(url, token=TOKEN, settings=ClientSettings())
        stack.callback(client.close)
        source = WeightSource(url, TOKEN)
        engine: VllmEngine | RemoteVllmEngine
        if request.param == "remote":
            remote = stack.enter_context(vllm_server(directory, without_weights, settings))
            engine = RemoteVllmEngine(without_weights, remote, sampling=UNTRUNCATED, source=source)
        else:
            engine = VllmEngine(without_weights, settings, sampling=UNTRUNCATED, seed=7, source=source)
        yield Served(engine, HttpWeightStore(client), policies, directory)
