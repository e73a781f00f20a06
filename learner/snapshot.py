"""What is published of a policy at one moment: its rounded tensors, read piece by piece, and the canary's log-probs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from buffer.weights.manifest import Adapter, Probe
from buffer.weights.tensors import Bits, TensorSpec, Values
from learner.policy import Policy

PROBE_TOKENS = 32
"""Length of the canary: long enough that a wrong layer shows, short enough to score in one prefill."""
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A version's tensors and the proof that goes with them. The tensors are the policy's own until its next step."""

    tensors: tuple[Values, ...]  # tied weights once
    probe: Probe
    adapter: Adapter | None
    """What the tensors mean when they are an adapter's."""


def take_snapshot(policy: Policy, *, dtype: str, tolerance_nats: float) -> Snapshot:
    """Describe the weights as rounded to `dtype` (float32 or bfloat16), and score the probe with the rounded ones."""
    weights = policy.weights()
    token_ids = _probe_tokens(policy)
    ids = torch.tensor(token_ids[None].astype(np.int64), device=policy.model.device)
    with torch.no_grad(), _rounded(policy.model, weights, _DTYPES[dtype]):
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, :-1]  # [N - 1, V]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return Snapshot(
        tensors=tuple(_TorchValues.of(name, tensor, _DTYPES[dtype]) for name, tensor in weights.items()),
        probe=Probe(token_ids=token_ids, logprobs=logprobs.cpu().numpy(), tolerance=tolerance_nats),
        adapter=policy.adapter,
    )


@dataclass(frozen=True, slots=True)
class _TorchValues:
    """`buffer.weights.tensors.Values` of a torch tensor, rounded and brought to the host as they are read."""

    spec: TensorSpec
    flat: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor, dtype: torch.dtype) -> "_TorchValues":
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        spec = TensorSpec.model_validate({"name": name, "dtype": _NAMES[dtype], "shape": tuple(tensor.shape)})
        return cls(spec, tensor.detach().reshape(-1), dtype)

    def read(self, start: int, stop: int) -> Bits:
        """See Values."""
        rounded = self.flat[start:stop].to(self.dtype).cpu()
        return rounded.view(_BITS[self.spec.width]).numpy().view(self.spec.bits_dtype)


@contextmanager
def _rounded(model: torch.nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Let every module compute with rounded weights, one module at a time: no second copy of the model is made."""
    published = {tensor.data_ptr() for tensor in weights.values() if tensor.dtype != dtype}
    exact: dict[torch.nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def round_own(module: torch.nn.Module, *_: object) -> None:
        own = [p for p in module.parameters(recurse=False) if p.data_ptr() in published]
        exact[module] = [(parameter, parameter.data) for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)

    def restore(module: torch.nn.Module, *_: object) -> None:
        for parameter, data in exact.pop(module, []):
            parameter.data = data

    handles = []
    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(round_own),
            module.register_forward_hook(restore, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probe_tokens(policy: Policy) -> np.ndarray:
    """Return the same [N] int32 tokens for every version of a model, spread over its vocabulary."""
    length = min(PROBE_TOKENS, policy.max_positions)
    return np.random.default_rng(0).integers(0, policy.vocab_size, length, dtype=np.int32)
