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
from tests.factories import UNTRUNCATED

MAX_MODEL_TOKENS = 128
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
class Served:
    """An engine and the policy versions it can be given: version v has the weights v % 2."""

    engine: VllmEngine
    policies: tuple[PreTrainedModel, PreTrainedModel]
    files: tuple[Path, Path]

    def load(self, version: int) -> None:
        """Load the weights of a version into the engine."""
        self.engine.load(self.files[version % 2], version)

    def logits(self, token_ids: npt.NDArray[np.int32], version: int) -> torch.Tensor:
        """Return transformers' logits [N, V] for a sequence under a version."""
        with torch.no_grad():
            logits: torch.Tensor = self.policies[version % 2](
                torch.from_numpy(token_ids.astype(np.int64))[None]
            ).logits[0]
        return logits

    def recompute(self, prompt_ids: npt.NDArray[np.int32], drawn: Completion, temperature: float) -> torch.Tensor:
        """Return each response token's log-prob [T] under the version that its span names, over the kept ids."""
        sequence = np.concatenate([prompt_ids, drawn.response_ids])
        logprobs = []
        for span in drawn.spans:
            assert span.version is not None
            logits = self.logits(sequence, span.version)[len(prompt_ids) - 1 : -1] / temperature
            for position in range(span.start, span.end):
                kept = kept_at(drawn, position)
                support = logits[position] if kept is None else logits[position][kept]
                logprobs.append(logits[position, drawn.response_ids[position]] - support.logsumexp(-1))
        return torch.stack(logprobs)


def kept_at(drawn: Completion, position: int) -> list[int] | None:
    """Return the ids that truncated sampling kept for one token; None when nothing was cut."""
    if drawn.kept_token_ids is None or drawn.kept_token_counts is None:
        return None
    end = int(drawn.kept_token_counts[: position + 1].sum())
    ids: list[int] = drawn.kept_token_ids[end - drawn.kept_token_counts[position] : end].tolist()
    return ids


def make_policy(directory: Path, *, tied: bool, seed: int) -> PreTrainedModel:
    """Make a Qwen2 with large random weights and biases, so that a wrong layer shows in nats, and save it."""
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_TOKENS,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=END_ID,
        initializer_range=0.3,
        dtype="float32",
    )
    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    policy.save_pretrained(directory)
    vocabulary = {"<bos>": 0, "<eos>": END_ID} | {str(token_id): token_id for token_id in range(2, 48)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<bos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(directory)
    return policy


@pytest.fixture(scope="session", params=["tied", "untied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Start vLLM on a directory without weights; versions 0 and 1 can be loaded."""
    torch.set_num_threads(1)
    directories = tuple(tmp_path_factory.mktemp(f"{request.param}_{seed}") for seed in (0, 1))
    policies = tuple(make_policy(d, tied=request.param == "tied", seed=seed) for seed, d in enumerate(directories))
    files = tuple(d / "model.safetensors" for d in directories)
    without_weights = tmp_path_factory.mktemp(f"{request.param}_config")
    shutil.copytree(directories[0], without_weights, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    engine = VllmEngine(without_weights, VllmSettings(dtype="float32"), sampling=UNTRUNCATED, seed=7)
    return Served(engine, (policies[0], policies[1]), (files[0], files[1]))
