"""LoRA versions on plain weights: an adapter's tensors merged into the base that they belong to."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from buffer.errors import CorruptWeights, InvalidSettings
from buffer.types import PolicyVersion
from buffer.weights.manifest import Adapter

_MODULES = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def base_weights(model_dir: Path) -> dict[str, Tensor]:
    """Return the float32 weights of a model directory. Raises InvalidSettings when it holds none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidSettings(
            f"{model_dir} does not hold the weights that an adapter needs as its base: {error}",
            hint="copy the learner's model directory with its weights",
        ) from error
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@torch.no_grad()
def merged(
    base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], adapter: Adapter, *, version: PolicyVersion
) -> dict[str, Tensor]:
    """Return the base with alpha / rank * B A added to every adapted weight.

    Raises CorruptWeights unless the tensors are the A [rank, in] and B [out, rank] of linear modules of the base.
    """
    weights, left = dict(base), dict(tensors)
    for name in [name for name in tensors if name.endswith(_DOWN)]:
        module = name.removesuffix(_DOWN)
        weight = module.removeprefix(_MODULES) + ".weight"
        down, up = left.pop(name), left.pop(module + _UP, None)
        fits = up is not None and weight in base and down.shape[0] == adapter.rank == up.shape[-1]
        if up is None or not fits or base[weight].shape != (up.shape[0], down.shape[1]):
            raise CorruptWeights(
                f"version {version}: {name} of rank {adapter.rank} does not fit the model's {weight}",
                hint="publish from the model directory that the actors use",
            )
        weights[weight] = base[weight] + adapter.alpha / adapter.rank * (up.float() @ down.float())
    if left or not tensors:
        raise CorruptWeights(f"version {version} is no adapter: unexpected tensors {sorted(left)[:4]}")
    return weights
