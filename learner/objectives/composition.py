"""A loss as a sentence: the sum of named terms, each a few pieces.

loss = aggregate(-gates * surrogate(tokens, advantage))
     + sum_k coefficient_k * aggregate(penalty_k) + coefficient * aggregate(residual^2)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from buffer.errors import StalewiseError
from learner.objectives.multipliers import DualAscent
from learner.objectives.objective import (
    Advantage,
    Gate,
    Loss,
    Multipliers,
    Reduction,
    SequencePiece,
    Surrogate,
    TokenPiece,
    Watch,
)
from learner.tokens import Column, Tokens, as_weights, cleaned


class NonFiniteLoss(StalewiseError, ArithmeticError):
    """Every input was finite, one part of the loss is not: the numbers are too large for float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermValue:
    """One term on one batch."""

    loss: Tensor
    """[] coefficient included."""
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    watch: Watch = dict


class Term(Protocol):
    """One named summand of a loss."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> frozenset[Column]: ...

    @property
    def reads_token_rewards(self) -> bool: ...

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> TermValue: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """coefficient * aggregate(-gates * surrogate): a closed token has advantage 0, and so has its surrogate."""

    surrogate: Surrogate
    advantage: Advantage
    aggregate: Reduction
    gates: Mapping[str, Gate] = field(default_factory=dict)
    clips: Mapping[str, Gate] = field(default_factory=dict)
    """Gates that the surrogate's own shape implies: reported, not applied a second time."""
    coefficient: float = 1.0
    name: str = "policy"
    reads: frozenset[Column] = frozenset()
    """Columns of the surrogate and of the gates."""

    @property
    def columns(self) -> frozenset[Column]:
        return self.reads | self.advantage.columns

    @property
    def reads_token_rewards(self) -> bool:
        return self.advantage.reads_token_rewards

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> TermValue:
        with torch.no_grad():
            advantage = self.advantage(tokens)
            gates = {name: gate(tokens, advantage) for name, gate in self.gates.items()}
            clips = {name: clip(tokens, advantage) for name, clip in self.clips.items()}
            for is_open in gates.values():
                advantage = advantage * as_weights(is_open)
        values = self.surrogate(tokens, advantage)
        return TermValue(
            loss=-self.coefficient * self.aggregate(tokens, values),
            gates={name: gate.expand_as(tokens.mask) for name, gate in (gates | clips).items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """coefficient * aggregate(piece)."""

    name: str
    piece: TokenPiece
    aggregate: Reduction
    coefficient: float
    columns: frozenset[Column] = frozenset()
    reads_token_rewards: ClassVar = False

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> TermValue:
        return TermValue(loss=self.coefficient * self.aggregate(tokens, self.piece(tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """lambda * aggregate(piece), lambda learnt by dual ascent."""

    piece: TokenPiece
    aggregate: Reduction
    dual: DualAscent
    reads_token_rewards: ClassVar = False

    @property
    def name(self) -> str:
        return self.dual.name

    @property
    def columns(self) -> frozenset[Column]:
        return self.dual.advantage.columns

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> TermValue:
        loss = multipliers[self.dual.name] * self.aggregate(tokens, self.piece(tokens))
        return TermValue(loss=loss, watch=lambda: self._watched(tokens, multipliers))

    def _watched(self, tokens: Tokens, multipliers: Multipliers) -> Mapping[str, Tensor]:
        values, fresh = self.piece(tokens), self.dual.fresh(tokens)
        return {
            f"{self.name}_fresh": _mean_where(fresh, values),
            f"{self.name}_stale": _mean_where(tokens.mask & ~fresh, values),
            f"{self.name}_saturated": self.dual.saturated(multipliers),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredResidual:
    """coefficient * aggregate(residual^2), one residual a trajectory, never gated."""

    residual: SequencePiece
    aggregate: Reduction
    columns: frozenset[Column]
    coefficient: float = 1.0
    name: str = "bellman"
    reads_token_rewards: ClassVar = False

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> TermValue:
        residual = self.residual(tokens)
        loss = self.coefficient * self.aggregate(tokens, residual.square())
        return TermValue(loss=loss, watch=lambda: {f"{self.name}_residual": residual.detach()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """An Objective: terms, and at most one of them a constraint with its multiplier."""

    name: str
    denominator: str
    terms: tuple[Term, ...]
    dual: DualAscent | None = None

    @property
    def columns(self) -> frozenset[Column]:
        return frozenset[Column]().union(*(term.columns for term in self.terms))

    @property
    def reads_token_rewards(self) -> bool:
        return any(term.reads_token_rewards for term in self.terms)

    def __call__(self, tokens: Tokens, multipliers: Multipliers) -> Loss:
        tokens = cleaned(tokens, self.columns)
        values = {term.name: term(tokens, multipliers) for term in self.terms}
        total = torch.stack([value.loss for value in values.values()]).sum()
        parts = {name: value.loss.detach() for name, value in values.items()}
        if not total.isfinite():
            sums = ", ".join(f"{name} {part.item():g}" for name, part in parts.items())
            raise NonFiniteLoss(
                f"the loss of {self.name} is not finite ({sums})", hint="lower the offending coefficient"
            )
        return Loss(
            total=total,
            parts=parts,
            gates={name: gate for value in values.values() for name, gate in value.gates.items()},
            watch=lambda: {name: seen for value in values.values() for name, seen in value.watch().items()},
        )

    def initial_multipliers(self) -> dict[str, float]:
        return self.dual.initial() if self.dual else {}

    def next_multipliers(self, tokens: Tokens, multipliers: Multipliers) -> dict[str, float]:
        return self.dual.advanced(cleaned(tokens, self.columns), multipliers) if self.dual else {}


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """[]: nan where nothing is chosen."""
    return torch.where(chosen, values, 0.0).sum() / chosen.count_nonzero()
