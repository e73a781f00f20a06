"""A multiplier that learns by projected gradient ascent, so that a statistic of the batch meets its target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.aggregation import mean_over_tokens
from learner.objectives.objective import Advantage, Multipliers, TokenPiece
from learner.tokens import Tokens


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

    def initial(self) -> dict[str, float]:
        """The state before the first batch."""
        return {self.name: self.start, self._ema: self.target}

    @torch.no_grad()
    def advanced(self, tokens: Tokens, multipliers: Multipliers) -> dict[str, float]:
        """Take one step; a batch whose advantages are all 0 moves nothing, for it asked nothing of the policy."""
        if not self.advantage(tokens).any():
            return dict(multipliers)
        now = float(mean_over_tokens(tokens, self.statistic(tokens)))
        average = self.decay * multipliers[self._ema] + (1.0 - self.decay) * now
        moved = multipliers[self.name] + self.step * (average - self.target)
        return {self.name: min(max(moved, 0.0), self.maximum), self._ema: average}

    def saturated(self, multipliers: Multipliers) -> Tensor:
        """[] 1 where lambda sits at its maximum: the target is out of reach for now."""
        return torch.tensor(float(multipliers[self.name] >= self.maximum))

    @property
    def _ema(self) -> str:
        return f"{self.name}_ema"
