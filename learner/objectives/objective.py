"""The contract between the learner's step and a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from learner.tokens import Column, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What an objective says about one batch."""

    total: Tensor
    """[] the number to descend."""
    parts: Mapping[str, Tensor]
    """Named summands of `total`, detached, coefficients included."""
    gates: Mapping[str, Tensor]
    """Gate name -> [B, T] bool, True = keeps its gradient. Detached; metrics report the closed share per gate."""


class Objective(Protocol):
    """A recipe that was built: pieces and their settings. Pure: state that learns is passed in and handed back."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> frozenset[Column]:
        """The optional columns of `Tokens` it needs."""
        ...

    @property
    def denominator(self) -> str:
        """What the loss is divided by, in words: `all tokens`, `all sequences`, ..."""
        ...

    def __call__(self, tokens: Tokens, multipliers: Mapping[str, float]) -> Loss:
        """Compute the loss; gradients flow to the differentiable fields of `tokens`."""
        ...

    def initial_multipliers(self) -> dict[str, float]:
        """Start values of what learns by dual ascent; {} for most recipes. The learner checkpoints them."""
        ...

    def next_multipliers(self, tokens: Tokens, multipliers: Mapping[str, float]) -> dict[str, float]:
        """One dual step, from the detached batch just used, after the optimiser step."""
        ...
