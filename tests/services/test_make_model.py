"""The tiny model: made here, loadable everywhere, and as good as it says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from actor.evaluate import held_out_accuracy
from actor.settings import ActorSettings
from actor.tasks import RunningSums
from actor.torch_engine import TorchEngine
from buffer.errors import InvalidSettings
from services.make_model import CHARACTERS, make_model

SHIPPED = Path(__file__).parents[2] / "models" / "running-sums"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose warm-up was far too short."""
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=5, warmup_steps=40)
    return directory


def test_a_made_model_is_what_the_shipped_one_is_but_for_its_weights(short: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (short / name).read_text() == (SHIPPED / name).read_text(), name
    made, shipped = (AutoModelForCausalLM.from_pretrained(path, local_files_only=True) for path in (short, SHIPPED))
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    assert sum(parameter.numel() for parameter in made.parameters()) == 108_736
    assert made.dtype == torch.float32


def test_the_warm_up_teaches_that_answers_are_digits(short: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(short, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(short, local_files_only=True)
    prompt = RunningSums(tokenizer).held_out()[0].token_ids.tolist()

    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)

    assert probabilities[tokenizer.encode("0123456789")].sum() > 0.8  # 10 of 24 before any step


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, seed=seed, warmup_steps=20)

    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_every_loader_gives_each_character_its_own_token_and_back(loader: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = loader.from_pretrained(SHIPPED, local_files_only=True)

    ids = tokenizer.encode(CHARACTERS)

    assert ids == list(range(2, 24))
    assert tokenizer.decode(ids) == CHARACTERS
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 24)


def test_the_shipped_model_starts_between_sixteen_and_twenty_five_percent() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    engine = TorchEngine(SHIPPED, seed=0)
    engine.load(SHIPPED / "model.safetensors", 0)

    accuracy = held_out_accuracy(engine, RunningSums(tokenizer), ActorSettings())

    assert 0.14 <= accuracy <= 0.25  # 512 draws: the standard error is 0.017


def test_a_directory_that_holds_a_model_is_not_overwritten() -> None:
    with pytest.raises(InvalidSettings, match="already holds a model"):
        make_model(SHIPPED, seed=0)


def test_a_warm_up_shorter_than_the_rise_of_its_learning_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="at least 20, not 3"):
        make_model(tmp_path / "new", seed=0, warmup_steps=3)
    assert not (tmp_path / "new").exists()
