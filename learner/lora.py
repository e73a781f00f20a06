"""LoRA through peft: a policy of which only low-rank adapters are trained, saved and published."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from buffer.errors import InvalidSettings
from buffer.weights.manifest import Adapter
from learner.collate import Batch
from learner.policy import Policy
from learner.settings import ComputeSettings, LoraSettings

_NAME = "default"
"""What peft calls our one adapter; it stands in the names of parameters, and not in those of its files."""
_PREFIX = "base_model.model."
"""What peft puts before the names in its files."""


class AdapterPolicy(Policy):
    """A policy whose base is frozen. Its weights are the adapter's, under the names of peft's files."""

    def __init__(
        self, model: PreTrainedModel, *, micro_batch_tokens: int, compute: ComputeSettings, adapter: Adapter
    ) -> None:
        super().__init__(model, micro_batch_tokens=micro_batch_tokens, compute=compute)
        self.adapter = adapter

    @classmethod
    def on(cls, policy: Policy, settings: LoraSettings) -> "AdapterPolicy":
        """Freeze a policy's model and add an adapter that changes nothing yet.

        Raises InvalidSettings when peft is not installed, or the model has no such modules.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InvalidSettings(
                "learner.lora is set but peft is not installed", hint="in the clone: pip install '.[lora]'"
            ) from error
        adapter = Adapter(rank=settings.rank, alpha=settings.alpha, target_modules=settings.target_modules)
        model = policy.model.requires_grad_(False)
        try:
            inject_adapter_in_model(LoraConfig(**adapter.peft_config()), model, adapter_name=_NAME)
        except ValueError as error:  # none of the modules exists, or one is not linear
            raise InvalidSettings(f"learner.lora.target_modules={list(settings.target_modules)}: {error}") from error
        return cls(model, micro_batch_tokens=policy.micro_batch_tokens, compute=policy.compute, adapter=adapter)

    def weights(self) -> dict[str, Tensor]:
        """Return views of the adapter's tensors."""
        part = f".{_NAME}.weight"
        return {
            f"{_PREFIX}{name.removesuffix(part)}.weight": parameter.detach()
            for name, parameter in self.model.named_parameters()
            if name.endswith(part)
        }

    def frozen_copy(self) -> Policy:
        """Return the base: this very model with its adapter off. Nothing is copied."""
        return _AdapterOff(self.model, micro_batch_tokens=self.micro_batch_tokens, compute=self.compute)


class _AdapterOff(Policy):
    """The model without its adapter. It has no weights of its own."""

    def weights(self) -> dict[str, Tensor]:
        """See Policy."""
        return {}

    def unit_scores(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See Policy."""
        with _adapter_off(self.model):
            return super().unit_scores(batch, rows)


@contextmanager
def _adapter_off(model: torch.nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
