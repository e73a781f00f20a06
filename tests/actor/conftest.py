"""A real tiny Qwen2 and published versions of it, made once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from actor.torch_engine import TorchEngine

EOS = 1
CHARACTERS = "0123456789=+-*/()., ab"
VOCABULARY = 24


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(CHARACTERS)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Config and tokenizer; the large initializer range makes log-probs of versions differ by nats."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(directory)
    Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.25,
        eos_token_id=EOS,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def keyframes(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different versions as safetensors files, tied weights once."""
    directory = tmp_path_factory.mktemp("keyframes")
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(model_dir))
        path = directory / f"{seed}.safetensors"
        save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, path)
        paths.append(path)
    return paths


@pytest.fixture
def engine(model_dir: Path, keyframes: Sequence[Path]) -> TorchEngine:
    """An engine at version 0."""
    engine = TorchEngine(model_dir, seed=7)
    engine.load(keyframes[0], 0)
    return engine


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters; others become the padding token."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
