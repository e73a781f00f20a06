"""A multiplier that learns by projected gradient ascent, so that a statistic of the batch meets its target."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.objectives.aggregation import mean_over_tokens
from learner.objectives.objective import Advantage, Multipliers, TokenPiece
from learner.tokens import Tokens

FRESH_UPDATES = 1
"""Age up to which a token is fresh: drawn by the policy of this update or by the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DualAscent:
    """lambda <- clip(lambda + step * (ema of mean_over_tokens(statistic) - target), 0, maximum).

    State, owned by the learner: `NAME` is lambda, `NAME_ema` the average; it starts at the target, which asks nothing.
    """

    name: str
    statistic: TokenPiece
    advantage: Advantage
    target: float
    step: float
    start: float
    maximum: float
    decay: float
    """Of the average: 0 = this batch alone."""
    fresh_updates: int = FRESH_UPDATES
    """Tokens of at most this age are the fresh bucket; the others, foreign ones too, are the stale one."""
    fresh_only: bool = False
    """Average the statistic over the fresh bucket alone."""

    def initial(self) -> dict[str, float]:
        """The state before the first batch."""
        return {self.name: self.start, self._ema: self.target}

    @torch.no_grad()
    def advanced(self, tokens: Tokens, multipliers: Multipliers) -> dict[str, float]:
        """Take one step; a batch without advantages moves nothing, nor does one without a token to measure."""
        measured = self.fresh(tokens) if self.fresh_only else tokens.mask
        if not self.advantage(tokens).any() or not measured.any():
            return dict(multipliers)
        now = float(mean_over_tokens(replace(tokens, mask=measured), self.statistic(tokens)))
        average = self.decay * multipliers[self._ema] + (1.0 - self.decay) * now
        moved = multipliers[self.name] + self.step * (average - self.target)
        return {self.name: min(max(moved, 0.0), self.maximum), self._ema: average}

    def fresh(self, tokens: Tokens) -> Tensor:
        """[B, T] bool: the trained tokens of the fresh bucket."""
        return tokens.mask & (tokens.age_updates >= 0) & (tokens.age_updates <= self.fresh_updates)

    def saturated(self, multipliers: Multipliers) -> Tensor:
        """[] 1 where lambda sits at its maximum: the target is out of reach for now."""
        return torch.tensor(float(multipliers[self.name] >= self.maximum))

    @property
    def _ema(self) -> str:
        return f"{self.name}_ema"
