"""From hidden states to scores without logits [tokens, vocabulary]: by chunks of tokens, recomputed going backward.

Legend: n trained tokens; c of them in a chunk; V vocabulary; H hidden size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.scoring import DIFFERENTIABLE, Targets, logits_gradient, score
from learner.tokens import Column

_SMALLEST_CHUNK_LOGITS = 1 << 20
"""A chunk is never smaller than this many logits (4 MiB): below it the calls cost more than the memory is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What a model does to hidden states besides the matrix: logits = cap * tanh(scale * (W h + b) / cap)."""

    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    """In which the matrix products are computed; all else is float32."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[c, V] float32, of hidden states and a matrix in `dtype`."""
        logits = _product(hidden, weight.T)
        if bias is not None:
            logits += bias.float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def before_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Take the gradient [c, V] of capped, scaled logits back to W h + b, in place."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap).square()
        if self.scale != 1.0:
            gradient *= self.scale
        return gradient


@dataclass(frozen=True, slots=True)
class _Task:
    shape: HeadShape
    drawn: Targets
    wanted: frozenset[Column]

    def chunks(self, vocab_size: int) -> Iterator[tuple[int, int]]:
        size = max(self.shape.chunk_tokens, _SMALLEST_CHUNK_LOGITS // vocab_size)
        return ((first, min(first + size, len(self.drawn))) for first in range(0, len(self.drawn), size))


def scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, drawn: Targets, wanted: frozenset[Column], shape: HeadShape
) -> dict[str, Tensor]:
    """Score hidden states [n, H]: see `scoring.score`. Gradients flow to hidden states, matrix and bias."""
    names: list[str] = []
    values = _Scores.apply(hidden, weight, bias, _Task(shape, drawn, wanted), names)  # type: ignore[no-untyped-call]
    return dict(zip(names, values, strict=True))


def descent(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    drawn: Targets,
    gradients: Mapping[str, Tensor],
    shape: HeadShape,
) -> Tensor:
    """Return a zero [] whose gradient is that of sum(gradient * score), for gradients [n] that are known beforehand.

    That takes one pass over the chunks, where scores and their backward take two.
    """
    task = _Task(shape, drawn, frozenset())
    value: Tensor = _Descent.apply(hidden, weight, bias, task, gradients)  # type: ignore[no-untyped-call]
    return value


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, names: list[str]
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(task.shape.dtype)
            parts = [
                score(
                    task.shape.logits(hidden[first:last].to(task.shape.dtype), matrix, bias),
                    task.drawn.part(first, last),
                    task.wanted,
                )
                for first, last in task.chunks(len(weight))
            ]
        names += parts[0]
        values = {name: torch.cat([part[name] for part in parts]) for name in names}
        ctx.save_for_backward(hidden, weight, bias)
        ctx.task, ctx.names = task, names
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in DIFFERENTIABLE))
        return tuple(values.values())

    @staticmethod
    def backward(ctx: Any, *of_scores: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        gradients = {name: of for name, of in zip(ctx.names, of_scores, strict=True) if name in DIFFERENTIABLE}
        return (*_gradients(hidden, weight, bias, ctx.task, gradients, ctx.needs_input_grad), None, None)


class _Descent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, gradients: Mapping[str, Tensor]
    ) -> Tensor:
        ctx.save_for_backward(*_gradients(hidden, weight, bias, task, gradients, ctx.needs_input_grad))
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out what is known; `of_value` is 1, since a descent is the root of its backward pass."""
        return (*ctx.saved_tensors, None, None)


@torch.no_grad()
def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task: _Task,
    gradients: Mapping[str, Tensor],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden states, matrix and bias, each where it is needed."""
    shape = task.shape
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(shape.dtype)
        for first, last in task.chunks(len(weight)):
            states = hidden[first:last].to(shape.dtype)
            part = {name: of_score[first:last] for name, of_score in gradients.items()}
            of_logits = _logits_gradient(states, matrix, bias, shape, task.drawn.part(first, last), part)
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            of_logits = of_logits.to(shape.dtype)
            if of_hidden is not None:
                of_hidden[first:last] = of_logits @ matrix
            if of_weight is not None:
                _add_product(of_weight, of_logits.T, states)
            del of_logits  # before the next chunk's are made
    return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), of_bias


def _logits_gradient(
    states: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    shape: HeadShape,
    drawn: Targets,
    gradients: Mapping[str, Tensor],
) -> Tensor:
    """Return d sum(gradient * score) / d (W h + b) [c, V], float32."""
    logits = shape.logits(states, matrix, bias)
    capped = logits.clone() if shape.softcap is not None else logits
    return shape.before_cap(logits_gradient(logits, drawn, gradients), capped)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float32, also of 16-bit factors."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a float32 matrix in place."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
