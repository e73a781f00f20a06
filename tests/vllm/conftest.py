"""One vLLM engine per kind of output layer, two sets of weights for each, and transformers to compare with."""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from actor.engine import Completion
from actor.settings import VllmSettings
from actor.vllm_engine import VllmEngine
from buffer.types import Trajectory
from tests.factories import UNTRUNCATED

MAX_MODEL_TOKENS = 128
VOCABULARY = 48
END_ID = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs vLLM where there is none; vLLM's own warnings are not ours to fix."""
    absent = pytest.mark.skip(reason="vLLM is not installed here: run `make test-vllm`")
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(300))
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
    """An engine and the policies it can be given."""

    engine: VllmEngine
    policies: Policies

    def load(self, version: int) -> None:
        """Load the weights of a version into the engine."""
        self.engine.load(self.policies.file(version), version)


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
        eos_token_id=END_ID,
        initializer_range=0.3,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.save_pretrained(directory)
    words = ["<bos>", "<eos>", *"0123456789=", *(f"word{i}" for i in range(VOCABULARY - 13))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<bos>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return model


@pytest.fixture(scope="session", params=["tied", "untied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Start vLLM on a directory without weights; any version can be loaded."""
    directories = tmp_path_factory.mktemp(f"{request.param}_0"), tmp_path_factory.mktemp(f"{request.param}_1")
    policies = make_policies(directories, tied=request.param == "tied")
    without_weights = tmp_path_factory.mktemp(f"{request.param}_config")
    shutil.copytree(directories[0], without_weights, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    engine = VllmEngine(without_weights, VllmSettings(dtype="float32"), sampling=UNTRUNCATED, seed=7)
    return Served(engine, policies)
