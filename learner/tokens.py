"""The one record an objective reads: a whole batch, right-padded over response tokens.

Legend: B trajectories, T response positions (longest of the batch), G groups. Padding and context tokens have mask
False. What stands behind the mask may be anything, even nan: `cleaned` leaves no number there that a product with the
mask would not make 0.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from buffer.errors import StalewiseError


class MissingColumns(StalewiseError, ValueError):
    """A batch lacks a column that its objective needs."""


class NonFiniteTokens(StalewiseError, ValueError):
    """A trained token or a reward is nan or infinite: no loss of it means anything."""


HARMLESS = 1e6
"""Numbers up to this may stay behind the mask: what a piece makes of them is finite, and 0 times it is 0. No log-prob
that means something is near it."""


class Column(StrEnum):
    """An optional column that a recipe must ask for; the learner computes nothing else."""

    UNIT_LOGPROBS = "unit_logprobs"
    REFERENCE_LOGPROBS = "reference_logprobs"
    FIRST_LOGIT = "first_logit"
    REFERENCE_FIRST_LOGIT = "reference_first_logit"
    PROXIMAL_LOGPROBS = "proximal_logprobs"
    LOGSUMEXP = "logsumexp"
    ENTROPY = "entropy"
    OTHER_SQUARED_PROBS = "other_squared_probs"
    EXACT_KL = "exact_kl"
    EXACT_TV = "exact_tv"
    KL_LOWER_BOUND = "kl_lower_bound"


PER_TRAJECTORY = frozenset({Column.FIRST_LOGIT, Column.REFERENCE_FIRST_LOGIT})
"""Columns [B]; the others are [B, T]."""

DIVERGENCES = frozenset({Column.EXACT_KL, Column.EXACT_TV, Column.KL_LOWER_BOUND})
"""Columns that need the distributions that the tokens were drawn from (actor.ship_distributions)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One batch. Differentiable: `logprobs`, and the columns `unit_logprobs`, `logsumexp` and `first_logit`."""

    logprobs: Tensor
    """[B, T] float32: log pi_theta of the drawn token under the stored sampling settings."""
    behavior_logprobs: Tensor
    """[B, T] float32: as the engine computed them when it drew the token."""
    mask: Tensor
    """[B, T] bool: the tokens that count, hence every denominator."""
    rewards: Tensor
    """[B] float32: one reward a trajectory."""
    group: Tensor
    """[B] int64 in [0, G), G <= B: trajectories of one prompt. Groups arrive whole."""
    episode: Tensor
    """[B] int64 in [0, B): trajectories of one episode share a number; they count once in the baseline."""
    age_updates: Tensor
    """[B, T] int64: learner clock - version of the token's span; -1 where the token is foreign or masked."""
    token_rewards: Tensor | None = None
    """[B, T] float32, optional."""
    columns: dict[Column, Tensor] = field(default_factory=dict)
    """unit_logprobs [B, T]: log pi_theta at temperature 1. reference_logprobs [B, T]: the reference, temperature 1.
    logsumexp [B, T]: log of the sum over the vocabulary of exp(logit), temperature 1.
    first_logit [B]: raw logit of the first trained token; reference_first_logit [B]: the reference's.
    proximal_logprobs, entropy: [B, T]. other_squared_probs [B, T]: sum of pi^2 over all tokens but the drawn one.
    exact_kl, exact_tv [B, T]: KL(behavior || policy) in nats and total variation over the whole vocabulary, under the
    sampling settings. kl_lower_bound [B, T]: what the shipped ids prove of that KL."""

    _known: dict[Callable[["Tokens"], Tensor], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", {})  # a changed copy starts with nothing known
        shape = self.logprobs.shape
        assert len(shape) == 2, f"logprobs must be [B, T], got {tuple(shape)}"
        for name in ("behavior_logprobs", "mask", "age_updates"):
            assert getattr(self, name).shape == shape, f"{name} must be {tuple(shape)}"
        for name in ("rewards", "group", "episode"):
            assert getattr(self, name).shape == shape[:1], f"{name} must be {tuple(shape[:1])}"
        assert self.mask.dtype == torch.bool, f"mask must be bool, got {self.mask.dtype}"
        for name, column in self.columns.items():
            assert column.shape in (shape, shape[:1]), f"column {name} has shape {tuple(column.shape)}"

    @property
    def num_trajectories(self) -> int:
        """B: all sequences of the batch, gated or not."""
        return self.logprobs.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """[] the number of trained tokens N, gated or not."""
        return self.lengths.sum()

    @property
    def lengths(self) -> Tensor:
        """[B] int64: trained tokens of each trajectory."""
        return self.once(_lengths)

    @property
    def weights(self) -> Tensor:
        """[B, T] float32: the mask as 1 and 0. On finite values a product with it does what `where` does in half the
        time, forward and backward."""
        return self.once(_weights)

    def once(self, piece: Callable[["Tokens"], Tensor]) -> Tensor:
        """Return piece(self), computed by whoever asks first, with its graph even if a gate without gradient asks."""
        if piece not in self._known:
            with torch.enable_grad():
                self._known[piece] = piece(self)
        return self._known[piece]


def as_weights(chosen: Tensor) -> Tensor:
    """bool -> float32, 1 and 0."""
    return chosen.view(torch.uint8).float()  # twice as fast as from bool


def cleaned(tokens: Tokens, columns: Collection[Column]) -> Tokens:
    """Return a copy in float32 with `columns` alone and what is HARMLESS behind the mask; gradients flow through it.

    Every piece of `learner.objectives` expects this form, since 0 * nan is nan, and masks in every sum and before an
    exponential without a guard; zeros behind the mask would cost a pass over every column. Where a trajectory has no
    trained token, its own numbers [B] are 0.
    Raises MissingColumns, and NonFiniteTokens when a trained token or a reward is nan or infinite.
    """
    if missing := sorted(set(columns) - set(tokens.columns)):
        raise MissingColumns(
            f"this objective needs the columns {', '.join(missing)}, which the batch does not have",
            hint="ask the forward pass, or give them in the batch file; divergences need shipped distributions",
        )
    trained_rows = tokens.lengths > 0
    fields = {
        "logprobs": tokens.logprobs.float(),
        "behavior_logprobs": tokens.behavior_logprobs.float(),
        "rewards": tokens.rewards.float(),
        **{name.value: tokens.columns[name].float() for name in columns},
    }
    if tokens.token_rewards is not None:
        fields["token_rewards"] = tokens.token_rewards.float()
    is_wild = not bool((_extremes(fields).abs() <= HARMLESS).all())  # behind the mask, or at a trained token
    fields = {
        name: torch.where(tokens.mask if value.dim() == 2 else trained_rows, value, 0.0)
        if is_wild or value.dim() == 1
        else value
        for name, value in fields.items()
    }
    if is_wild and not _extremes(fields).isfinite().all():
        raise _non_finite(fields)
    copy = replace(
        tokens,
        logprobs=fields["logprobs"],
        behavior_logprobs=fields["behavior_logprobs"],
        rewards=fields["rewards"],
        token_rewards=fields.get("token_rewards"),
        columns={name: fields[name.value] for name in columns},
    )
    copy._known.update({_lengths: tokens.lengths, _weights: tokens.weights})  # the mask is the same
    return copy


def _lengths(tokens: Tokens) -> Tensor:
    return tokens.weights.sum(-1).long()  # exact up to 2^24 tokens, and ten times as fast as a sum of truth values


def _weights(tokens: Tokens) -> Tensor:
    return as_weights(tokens.mask)


def _extremes(fields: Mapping[str, Tensor]) -> Tensor:
    """Smallest and largest number of each field; nan reaches both."""
    return torch.stack([extreme for value in fields.values() for extreme in value.detach().aminmax()])


def _non_finite(fields: Mapping[str, Tensor]) -> NonFiniteTokens:
    name, value = next((name, value) for name, value in fields.items() if not value.isfinite().all())
    index = (~value.isfinite()).nonzero()[0].tolist()
    where = f"trajectory {index[0]}" + (f", token {index[1]}" if len(index) == 2 else "")
    return NonFiniteTokens(
        f"{name} is {value[tuple(index)].item()} at {where} of the batch, where the mask counts it",
        hint="a drawn token has a finite log-probability: look for an overflow in the forward pass or a broken load",
    )
