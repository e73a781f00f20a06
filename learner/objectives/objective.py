"""The contract between the learner's step and a recipe, and the types of its pieces."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner.tokens import Column, Tokens


@dataclass(frozen=True, slots=True)
class Advantage:
    """How much better a trajectory or a token did than its siblings, and the columns that this is read from."""

    compute: Callable[[Tokens], Tensor]
    """-> [B, 1] or [B, T], no gradient."""
    columns: frozenset[Column] = frozenset()
    reads_token_rewards: bool = False
    """Whether it is made of the rewards of single tokens, too; if not, they teach nothing."""

    def __call__(self, tokens: Tokens) -> Tensor:
        return self.compute(tokens)


Multipliers = Mapping[str, float]
"""What learns by dual ascent, by name. The learner owns and checkpoints it."""

TokenPiece = Callable[[Tokens], Tensor]
"""-> [B, T], or [B, 1] where a whole sequence shares one: a ratio, a statistic, a penalty."""

SequencePiece = Callable[[Tokens], Tensor]
"""-> [B]: a residual."""

Surrogate = Callable[[Tokens, Tensor], Tensor]
"""(tokens, advantage) -> [B, T], to be maximised; its gradient reaches `tokens`. Where the advantage is 0, both are."""

Gate = Callable[[Tokens, Tensor], Tensor]
"""(tokens, advantage) -> [B, 1] or [B, T] bool, True = keeps its gradient."""

Reduction = Callable[[Tokens, Tensor], Tensor]
"""(tokens, values) -> []. Its name states the denominator, which counts the mask and never a gate."""


Watch = Callable[[], Mapping[str, Tensor]]
"""Detached quantities by name, computed when a metric asks: the loss itself does not need them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What an objective says about one batch."""

    total: Tensor
    """[] the number to descend."""
    parts: Mapping[str, Tensor]
    """Named summands of `total`, detached, coefficients included."""
    gates: Mapping[str, Tensor]
    """Gate name -> [B, T] bool, True = keeps its gradient. Detached; metrics report the closed share per gate.
    A hard clip is listed too: it closes tokens by the shape of its surrogate."""
    watch: Watch = dict
    """See `watched`."""

    @property
    def watched(self) -> Mapping[str, Tensor]:
        """Quantities that metrics report the mean of, such as the Bellman residual [B]; nan = none this time."""
        with torch.no_grad():
            return self.watch()


class Objective(Protocol):
    """A recipe that was built: pieces and their settings. Pure: state that learns is passed in and handed back.

    It wants the whole batch at once, since its denominators count it. A learner that cannot hold the graph of a whole
    batch takes d total / d logprobs on detached tensors first, and feeds it to `backward` slice by slice.
    """

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> frozenset[Column]:
        """The optional columns of `Tokens` it needs."""
        ...

    @property
    def reads_token_rewards(self) -> bool:
        """Whether rewards of single tokens enter."""
        ...

    @property
    def denominator(self) -> str:
        """What the loss is divided by, in words: `all tokens`, `all sequences`, ..."""
        ...

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> Loss:
        """Compute the loss; gradients flow to the differentiable fields of `tokens`.

        Raises MissingColumns, NonFiniteTokens, NonFiniteLoss.
        """
        ...

    def initial_multipliers(self) -> dict[str, float]:
        """Start values of what learns by dual ascent; {} for most recipes. The learner checkpoints them."""
        ...

    def next_multipliers(self, tokens: Tokens, multipliers: Multipliers) -> dict[str, float]:
        """One dual step, from the detached batch just used, after the optimiser step."""
        ...
