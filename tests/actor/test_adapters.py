"""Adapter versions against peft itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from actor.torch_engine import TorchEngine
from buffer.errors import CorruptWeights, InvalidSettings
from buffer.weights.manifest import Adapter

ADAPTER = Adapter(rank=3, alpha=7.5, target_modules=("q_proj", "v_proj", "down_proj"))
IDS = np.array([2, 9, 4, 7, 5, 3], np.int32)


@pytest.fixture(scope="module")
def base_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory with weights."""
    directory = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(model_dir)).save_pretrained(directory)
    return directory


def _save_adapter(base_dir: Path, path: Path, *, seed: int) -> PeftModel:
    """Save random tensors under peft's own names and return the model that holds them."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), LoraConfig(**ADAPTER.peft_config())
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_file(get_peft_model_state_dict(model), path)
    return model


@torch.no_grad()
def _peft_scores(model: PeftModel) -> np.ndarray:
    ids = torch.from_numpy(IDS.astype(np.int64))
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    scores: np.ndarray = logprobs.gather(-1, ids[1:, None]).squeeze(-1).numpy()
    return scores


def test_an_engine_gives_each_adapter_version_the_log_probs_that_peft_gives_it(base_dir: Path, tmp_path: Path) -> None:
    engine = TorchEngine(base_dir, seed=0)
    for version in range(2):
        model = _save_adapter(base_dir, tmp_path / "adapter", seed=version)

        engine.load(tmp_path / "adapter", version, adapter=ADAPTER)

        assert engine.version == version
        np.testing.assert_allclose(engine.score(IDS), _peft_scores(model), atol=1e-5)
        with model.disable_adapter():
            assert np.abs(engine.score(IDS) - _peft_scores(model)).max() > 0.5


def test_peft_reads_the_published_file_by_the_manifests_own_config(base_dir: Path, tmp_path: Path) -> None:
    model = _save_adapter(base_dir, tmp_path / "adapter_model.safetensors", seed=0)
    LoraConfig(**ADAPTER.peft_config()).save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), tmp_path)

    np.testing.assert_allclose(_peft_scores(loaded.eval()), _peft_scores(model), atol=1e-6)


@pytest.mark.parametrize("fault", ["another rank", "half a module", "an unknown module", "whole weights"])
def test_a_file_that_is_no_adapter_of_the_model_is_refused_and_the_weights_stay(
    base_dir: Path, tmp_path: Path, fault: str
) -> None:
    engine = TorchEngine(base_dir, seed=0)
    _save_adapter(base_dir, tmp_path / "adapter", seed=0)
    engine.load(tmp_path / "adapter", 1, adapter=ADAPTER)
    before = engine.score(IDS)
    tensors = load_file(tmp_path / "adapter")
    down = next(name for name in tensors if "lora_A" in name)
    if fault == "another rank":
        tensors[down] = tensors[down][:2]
    if fault == "half a module":
        del tensors[down.replace("lora_A", "lora_B")]
    if fault == "an unknown module":
        tensors[down.replace("layers.0", "layers.9")] = tensors.pop(down)
    save_file(load_file(base_dir / "model.safetensors") if fault == "whole weights" else tensors, tmp_path / "bad")

    with pytest.raises(CorruptWeights, match="version 2"):
        engine.load(tmp_path / "bad", 2, adapter=ADAPTER)

    assert engine.version == 1
    assert np.array_equal(engine.score(IDS), before)


def test_a_model_directory_without_weights_cannot_take_an_adapter(
    model_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    _save_adapter(base_dir, tmp_path / "adapter", seed=0)

    with pytest.raises(InvalidSettings, match="does not hold the weights that an adapter needs as its base"):
        TorchEngine(model_dir, seed=0).load(tmp_path / "adapter", 0, adapter=ADAPTER)
