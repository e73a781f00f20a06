"""A run's model is a directory or a copy in the local hub cache; nothing is fetched."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from buffer.errors import InvalidSettings
from services.model_dir import local_model_dir


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and an address of the hub that fails the test when it is asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    return tmp_path / "hub"


def test_a_path_that_exists_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    assert local_model_dir(tmp_path) == tmp_path


def test_a_model_in_the_cache_is_found_by_its_name(cache: Path) -> None:
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("0" * 40)

    assert local_model_dir(Path("some/model")) == snapshot


@pytest.mark.parametrize("model", ["some/model", "/nowhere/at/all"])
def test_anything_else_is_a_sentence_that_says_how_to_fetch_it(cache: Path, model: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        local_model_dir(Path(model))

    assert str(caught.value) == (
        f"{model} is neither a local model directory nor a model in the local hub cache (correct run.model, run"
        f" `stalewise make-model`, or fetch a model of the hub: `hf download {model}`)"
    )
