"""The default recipe: one term of each method for old data."""

import math
from enum import StrEnum
from typing import ClassVar, Self

from pydantic import model_validator

from learner.objectives.aggregation import mean_over_tokens, sum_over_sequences_per_token
from learner.objectives.bellman import REVAL_COLUMNS, reval_residual
from learner.objectives.composition import Composition, Constraint, PolicyGradient, SquaredResidual, Term
from learner.objectives.gates import trust_region, where_bad
from learner.objectives.multipliers import DualAscent
from learner.objectives.objective import TokenPiece
from learner.objectives.penalties import ratio_variance
from learner.objectives.ratios import (
    bounded_ratio,
    capped_prefix_ratio,
    no_ratio,
    prefix_ratio,
    soft_clip,
    token_ratio,
)
from learner.objectives.recipe import (
    AdvantageName,
    CentringName,
    ClipHigh,
    ClipLow,
    NonNegative,
    Positive,
    Recipe,
    Share,
    Threshold,
)
from learner.objectives.surrogates import score, tapered_score


class WeightName(StrEnum):
    MINPRO = "minpro"
    MINPRO_CAPPED = "minpro_capped"
    TOKEN = "token"
    NONE = "none"

    @property
    def ratio(self) -> TokenPiece:
        """The ratio that a policy gradient is weighted with."""
        return _WEIGHTS[self]


_WEIGHTS: dict[WeightName, TokenPiece] = {
    WeightName.MINPRO: prefix_ratio,
    WeightName.MINPRO_CAPPED: capped_prefix_ratio,
    WeightName.TOKEN: token_ratio,
    WeightName.NONE: no_ratio,
}


class Stalewise(Recipe):
    """The default: TOPR's taper, MinPRO's weight, TRM's gate; on demand R2VPO's constraint, ReVal's residual: ours."""

    name: ClassVar = "stalewise"
    paper: ClassVar = "ours, after arXiv 2503.14286, 2601.22718, 2512.23075, 2601.03320, 2603.23355"
    sentence: ClassVar = (
        "1/N sum { -policy_coefficient u A log pi + lambda (rho - 1)^2 }"
        " + bellman_coefficient beta / (2 N) sum_i delta_i^2, u = 1 if A >= 0 else [gate] s(w)"
    )
    use: ClassVar = "The default for old data: good answers in full, bad ones by weight and gate; a line for each part."
    denominator: ClassVar = "all tokens"

    policy_coefficient: NonNegative = 1.0
    """Of the policy gradient. 0 = off."""
    weight: WeightName = WeightName.MINPRO
    """Of a token in the policy gradient. none = off."""
    taper: bool = True
    """Tokens with A >= 0 have weight 1 and no gate, or the policy could not relearn what it unlearnt. False = off."""
    clip_low: ClipLow = 1.0
    """As in minpro."""
    clip_high: ClipHigh = 0.28
    """As in minpro."""
    max_k2: Threshold = 0.5
    """As in trm, but for stale data: 0.5 = one token may be 2.7 times likelier or less likely. inf = off."""
    mean_k3: Threshold = math.inf
    """As in trm. inf = off."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in GRPO. With the Bellman part leave_one_out: both in units of reward, so that the coefficients compare."""
    target_variance: Positive = 0.04
    """As in r2vpo."""
    lambda_start: NonNegative = 0.0
    """The constraint starts loose and tightens by itself."""
    lambda_max: NonNegative = 0.0
    """0 = no constraint; on: 0.1, as in r2vpo. Off since it cost up to 15 points and gained none."""
    dual_step: NonNegative = 0.02
    """As in r2vpo."""
    dual_decay: Share = 0.9
    """As in r2vpo: about ten batches, for one batch of mixed ages is noisy."""
    max_log_ratio: Positive = 5.0
    """As in r2vpo."""
    bellman_coefficient: NonNegative = 0.0
    """0 = no residual, no reference; on: 1, token-mean REINFORCE at the reference. Off since 1 cost 6 to 8 points."""
    beta: Positive = 0.2
    """As in reval, for responses of tens of tokens."""
    centring: CentringName = CentringName.LEAVE_ONE_OUT
    """Of the reward in the Bellman residual; leave_one_out leaves beta what it says."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy_coefficient == self.bellman_coefficient == 0:
            raise ValueError("policy_coefficient and bellman_coefficient are both 0: nothing would be learnt")
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"lambda_start={self.lambda_start} is above lambda_max={self.lambda_max}")
        return self

    def objective(self) -> Composition:
        dual = self._dual() if self.lambda_max else None
        terms: tuple[Term, ...] = ()
        if self.policy_coefficient:
            terms += (self._policy(),)
        if dual:
            terms += (Constraint(piece=dual.statistic, aggregate=mean_over_tokens, dual=dual),)
        if self.bellman_coefficient:
            terms += (self._bellman(),)
        return self.composed(*terms, dual=dual)

    def _policy(self) -> Term:
        weight = soft_clip(self.weight.ratio, low=self.clip_low, high=self.clip_high)
        gates = trust_region(max_k2=self.max_k2, mean_k3=self.mean_k3)
        return PolicyGradient(
            surrogate=tapered_score(weight) if self.taper else score(weight),
            advantage=self.advantage.piece,
            aggregate=mean_over_tokens,
            gates={name: where_bad(gate) for name, gate in gates.items()} if self.taper else gates,
            coefficient=self.policy_coefficient,
        )

    def _dual(self) -> DualAscent:
        return DualAscent(
            name="variance",
            statistic=ratio_variance(bounded_ratio(max_log_ratio=self.max_log_ratio)),
            advantage=self.advantage.piece,
            target=self.target_variance,
            step=self.dual_step,
            start=self.lambda_start,
            maximum=self.lambda_max,
            decay=self.dual_decay,
        )

    def _bellman(self) -> Term:
        return SquaredResidual(
            residual=reval_residual(beta=self.beta, centred=self.centring.advantage.piece),
            aggregate=sum_over_sequences_per_token,
            coefficient=self.bellman_coefficient * self.beta / 2,
            columns=REVAL_COLUMNS,
        )
