"""What is published of a policy at one moment: its rounded tensors, read piece by piece, and the canary's log-probs.

With several ranks each publishes whole tensors, about as many bytes as the others. A tensor is put together on all
ranks at once, for as long as the rank that publishes it reads it: none ever holds more than two beside its part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from buffer.weights.manifest import Adapter, Probe
from buffer.weights.tensors import Bits, TensorSpec, Values
from learner.distributed import ALONE, Ranks, whole
from learner.packing import pack
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

    specs: tuple[TensorSpec, ...]
    """What this rank publishes; tied weights once."""
    tensors: Iterable[Values]
    """The same with their values. With several ranks all of them go through their own, to the end, at one time."""
    probe: Probe
    adapter: Adapter | None
    """What the tensors mean when they are an adapter's."""


def take_snapshot(policy: Policy, *, dtype: str, tolerance_nats: float, ranks: Ranks = ALONE) -> Snapshot:
    """Describe the weights as rounded to `dtype` (float32 or bfloat16), and score the probe with the rounded ones.

    With several ranks all of them make this call, and each describes its share.
    """
    weights = policy.weights()
    token_ids = _probe_tokens(policy)
    ids = torch.tensor(token_ids[None].astype(np.int64), device=policy.model.device)
    # uncompiled: to a compiled layer the hooks of _rounded would be another module, or none
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, _rounded(policy.model, weights, _DTYPES[dtype]):
        logits = policy.probe_logits(ids)[0, :-1]  # [N - 1, V]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    tensors = RoundedTensors.of(weights, dtype, ranks=ranks)
    return Snapshot(
        specs=tensors.specs,
        tensors=tensors,
        probe=Probe(token_ids=token_ids, logprobs=logprobs.cpu().numpy(), tolerance=tolerance_nats),
        adapter=policy.adapter,
    )


@dataclass(frozen=True, slots=True)
class RoundedTensors:
    """The tensors that this rank publishes, made whole one after the other and rounded as they are read."""

    weights: Mapping[str, Tensor]  # everybody's, of which this rank may hold parts
    dtype: torch.dtype
    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], dtype: str, *, ranks: Ranks = ALONE) -> Self:
        """Choose this rank's share of the weights, floating-point ones to be rounded to `dtype`."""
        specs = [_spec(name, tensor, _DTYPES[dtype]) for name, tensor in weights.items()]
        own = _shares([spec.num_bytes for spec in specs], ranks.size)[ranks.rank]
        return cls(weights, _DTYPES[dtype], tuple(spec for index, spec in enumerate(specs) if index in own))

    def __iter__(self) -> Iterator[Values]:
        own = {spec.name: spec for spec in self.specs}
        for name, tensor in self.weights.items():
            # a tensor in parts is rounded before it travels; another one piece by piece, as it is read
            tensor = whole(_rounded_tensor(tensor.detach(), self.dtype)) if isinstance(tensor, DTensor) else tensor
            if name in own:
                yield _TorchValues(own[name], tensor.detach().reshape(-1), self.dtype)


def _shares(sizes_bytes: Sequence[int], num_ranks: int) -> list[set[int]]:
    """Return which tensors each rank publishes: as many bytes as the others, as nearly as whole tensors allow."""
    return [set(share) for share in pack(sizes_bytes, sum(sizes_bytes), num_ranks=num_ranks)]


@dataclass(frozen=True, slots=True)
class _TorchValues:
    """`buffer.weights.tensors.Values` of a torch tensor, rounded and brought to the host as they are read."""

    spec: TensorSpec
    flat: Tensor
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Bits:
        """See Values."""
        rounded = _rounded_tensor(self.flat[start:stop], self.dtype).cpu()
        return rounded.view(_BITS[self.spec.width]).numpy().view(self.spec.bits_dtype)


def _spec(name: str, tensor: Tensor, dtype: torch.dtype) -> TensorSpec:
    published = dtype if tensor.is_floating_point() else tensor.dtype
    return TensorSpec.model_validate({"name": name, "dtype": _NAMES[published], "shape": tuple(tensor.shape)})


def _rounded_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _rounded(model: torch.nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Let every module compute with rounded weights, one module at a time: no second copy of the model is made.

    The parameters of a module are looked up when it runs: sharding puts whole ones in the place of the parts.
    """
    published = {_address(tensor) for tensor in weights.values() if tensor.dtype != dtype}
    names = {
        module: [name for name, p in module.named_parameters(recurse=False) if _address(p) in published]
        for module in model.modules()
    }
    exact: dict[torch.nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def round_own(module: torch.nn.Module, *_: object) -> None:
        own = [module.get_parameter(name) for name in names[module]]
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


def _address(tensor: Tensor) -> int:
    """Return where a tensor, or this rank's part of it, begins in memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def _probe_tokens(policy: Policy) -> np.ndarray:
    """Return the same [N] int32 tokens for every version of a model, spread over its vocabulary."""
    length = min(PROBE_TOKENS, policy.max_positions)
    return np.random.default_rng(0).integers(0, policy.vocab_size, length, dtype=np.int32)
