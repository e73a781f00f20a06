import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actor.end_tokens import end_token_ids
from actor.engine import GenerationRequest
from actor.torch_engine import TorchEngine
from buffer.errors import InvalidSettings
from buffer.types import FinishReason, SamplingSettings
from tests.actor.conftest import EOS
from tests.actor.test_torch_engine import request

SECOND_END = 7


@pytest.fixture
def chat_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a generation_config.json that names a second end token, as those of chat models do."""
    directory = tmp_path / "chat"
    shutil.copytree(model_dir, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [SECOND_END, EOS]}))
    return directory


def test_the_torch_engine_stops_at_every_end_token_of_the_model(chat_dir: Path, keyframes: list[Path]) -> None:
    engine = TorchEngine(chat_dir, seed=7)
    engine.load(keyframes[0], 0)
    top_5 = SamplingSettings(temperature=1.0, top_p=1.0, top_k=5, min_p=0.0)
    requests: list[GenerationRequest] = [request((3 + i,), sampling=top_5, max_new_tokens=30) for i in range(20)]

    drawn = engine.generate(requests)

    assert {EOS, SECOND_END} < {completion.response_ids[-1] for completion in drawn}
    for completion in drawn:
        *before, last = completion.response_ids.tolist()
        assert not {EOS, SECOND_END} & set(before)
        assert completion.finish_reason is (FinishReason.STOP if last in (EOS, SECOND_END) else FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": [9, 3, EOS]}, (EOS, 3, 9)),
        ({"eos_token_id": 3}, (EOS, 3)),
        ({"eos_token_id": EOS}, (EOS,)),
        ({"eos_token_id": None}, (EOS,)),
        ({"temperature": 0.7}, (EOS,)),
    ],
)
def test_the_tokenizers_end_token_comes_first_then_those_of_the_generation_config(
    chat_dir: Path, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (chat_dir / "generation_config.json").write_text(json.dumps(config))

    assert end_token_ids(chat_dir) == expected


def test_without_a_generation_config_the_tokenizers_end_token_is_the_only_one(model_dir: Path) -> None:
    assert end_token_ids(model_dir) == (EOS,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"generation_config\.json cannot be read: Expecting property name"),
        ("[1]", r"generation_config\.json cannot be read: 'list' object"),
        ('{"eos_token_id": ["<eos>"]}', r"has eos_token_id \['<eos>'\], which is neither an id nor a list of ids"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_one_sentence(chat_dir: Path, content: str, sentence: str) -> None:
    (chat_dir / "generation_config.json").write_text(content)

    with pytest.raises(InvalidSettings, match=sentence):
        end_token_ids(chat_dir)
