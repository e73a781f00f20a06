"""The one record an objective reads: a whole batch, right-padded over response tokens.

Legend: B trajectories, T response positions (longest of the batch), G groups. Padding and context tokens have mask
False; whatever stands behind the mask is never read by a piece (mask before computing).
"""

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor


class Column(StrEnum):
    """An optional column that a recipe must ask for; the learner computes nothing else."""

    UNIT_LOGPROBS = "unit_logprobs"
    REFERENCE_LOGPROBS = "reference_logprobs"
    FIRST_LOGIT = "first_logit"
    REFERENCE_FIRST_LOGIT = "reference_first_logit"
    PROXIMAL_LOGPROBS = "proximal_logprobs"
    ENTROPY = "entropy"
    SUM_SQUARED_PROBS = "sum_squared_probs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One batch. Differentiable: `logprobs`, and the columns `unit_logprobs` and `first_logit`."""

    logprobs: Tensor
    """[B, T] float32: log pi_theta of the drawn token under the stored sampling settings."""
    behavior_logprobs: Tensor
    """[B, T] float32: as the engine computed them when it drew the token."""
    mask: Tensor
    """[B, T] bool: the tokens that count, hence every denominator."""
    rewards: Tensor
    """[B] float32: one reward a trajectory."""
    group: Tensor
    """[B] int64 in [0, G): trajectories of one prompt. Groups arrive whole."""
    episode: Tensor
    """[B] int64: trajectories of one episode share a number; they count once in the baseline."""
    age_updates: Tensor
    """[B, T] int64: learner clock - version of the token's span; -1 where the token is foreign or masked."""
    token_rewards: Tensor | None = None
    """[B, T] float32, optional."""
    columns: dict[Column, Tensor] = field(default_factory=dict)
    """unit_logprobs [B, T]: log pi_theta at temperature 1. reference_logprobs [B, T]: the reference, temperature 1.
    first_logit [B]: raw logit of the first trained token; reference_first_logit [B]: the reference's.
    proximal_logprobs, entropy, sum_squared_probs: [B, T]."""

    def __post_init__(self) -> None:
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
        return self.mask.sum()

    @property
    def lengths(self) -> Tensor:
        """[B] trained tokens of each trajectory."""
        return self.mask.sum(-1)
