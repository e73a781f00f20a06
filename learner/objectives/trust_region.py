"""Trust Region Masking and its length-neutral forms: sequences that left the trust region leave as a whole."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Self

from pydantic import model_validator

from learner.objectives.aggregation import mean_over_sequences_of_sums
from learner.objectives.composition import Composition, PolicyGradient
from learner.objectives.gates import length_neutral, sequence_mean, trust_region
from learner.objectives.objective import Gate
from learner.objectives.ratios import deviation, token_ratio
from learner.objectives.recipe import AdvantageName, Positive, Recipe, Threshold
from learner.objectives.surrogates import importance
from learner.tokens import Column


class KlName(StrEnum):
    EXACT = "exact"
    LOWER_BOUND = "lower_bound"

    @property
    def column(self) -> Column:
        """The column that holds it."""
        return Column.EXACT_KL if self is KlName.EXACT else Column.KL_LOWER_BOUND


class Trm(Recipe):
    """Trust Region Masking: a sequence leaves as a whole when one token, or their mean, left the trust region."""

    name: ClassVar = "trm"
    paper: ClassVar = "arXiv 2512.23075"
    sentence: ClassVar = (
        "-1/B sum_i [max_t k2 <= max_k2 and mean_t k3 <= mean_k3 and max_t KL <= max_kl and mean_t KL <= mean_kl]"
        " sum_t rho A"
    )
    use: ClassVar = "Small steps away from the sampler, long responses; set thresholds from the acceptance curve."
    denominator: ClassVar = "all sequences"

    max_k2: Threshold = 0.05
    """Largest (log rho)^2 / 2 of a kept sequence, in nats: the paper's TRM-Max threshold, on its sample stand-in."""
    mean_k3: Threshold = math.inf
    """Largest mean of rho - 1 - log rho of a kept sequence, in nats; the paper's TRM-Avg has 0.001. inf = off."""
    max_kl: Threshold = math.inf
    """Largest KL(behavior || pi) of any token of a kept sequence, in nats; the paper has 0.05. Needs distributions."""
    mean_kl: Threshold = math.inf
    """Largest mean of that KL over a kept sequence, in nats; the paper has 0.001. Needs distributions."""
    kl: KlName = KlName.EXACT
    """Of max_kl and mean_kl; lower_bound takes shipped distributions of the most likely ids alone."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in GRPO, which the paper builds on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_k2 == self.mean_k3 == self.max_kl == self.mean_kl == math.inf:
            raise ValueError("max_k2, mean_k3, max_kl and mean_kl are all off: set one of them")
        return self

    def objective(self) -> Composition:
        reads_kl = math.isfinite(self.max_kl) or math.isfinite(self.mean_kl)
        gates = trust_region(
            max_k2=self.max_k2, mean_k3=self.mean_k3, max_kl=self.max_kl, mean_kl=self.mean_kl, kl=self.kl.column
        )
        reads = frozenset({self.kl.column}) if reads_kl else frozenset[Column]()
        return self.composed(_gated(self.advantage, gates, reads=reads))


class TrmLengthNeutral(Recipe):
    """TRM with one threshold for all lengths: a token weighs by how many tokens come after it."""

    name: ClassVar = "trm_ln"
    paper: ClassVar = "arXiv 2512.23075 (LN-TRM)"
    sentence: ClassVar = (
        "-1/B sum_i [sum_t w_t |rho - 1| <= weighted_deviation sum_t w_t] sum_t rho A,"
        " w_t = min(1, (T - t) epsilon, sqrt((T - t) delta / 2))"
    )
    use: ClassVar = "Responses of very unequal length, where the maximum of trm rejects the long ones."
    denominator: ClassVar = "all sequences"

    weighted_deviation: Threshold = 0.05
    """Largest weighted mean of |rho - 1| of a kept sequence; the paper's value is unknown, this is SER's (derived)."""
    epsilon: Positive = 0.05
    """Radius in total variation of one token: how far the weights rise per later token (derived)."""
    delta: Positive = 0.01
    """Radius in KL of one token, in nats: bounds the weights far from the end (derived)."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in trm."""

    def objective(self) -> Composition:
        gate = length_neutral(epsilon=self.epsilon, delta=self.delta, threshold=self.weighted_deviation)
        return self.composed(_gated(self.advantage, {"length_neutral": gate}))


class TrmSer(Recipe):
    """TRM on the mean deviation of a sequence's ratios from 1."""

    name: ClassVar = "trm_ser"
    paper: ClassVar = "arXiv 2512.23075 (SER)"
    sentence: ClassVar = "-1/B sum_i [mean_t |rho - 1| <= mean_deviation] sum_t rho A"
    use: ClassVar = "As trm_ln, without its weights: one number to set."
    denominator: ClassVar = "all sequences"

    mean_deviation: Threshold = 0.05
    """Largest mean of |rho - 1| of a kept sequence; the paper suggests 0.03 to 0.10."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in trm."""

    def objective(self) -> Composition:
        gate = sequence_mean(deviation, threshold=self.mean_deviation)
        return self.composed(_gated(self.advantage, {"mean_deviation": gate}))


TRUST_REGION_RECIPES: tuple[type[Recipe], ...] = (Trm, TrmLengthNeutral, TrmSer)


def _gated(
    advantage: AdvantageName, gates: Mapping[str, Gate], *, reads: frozenset[Column] = frozenset()
) -> PolicyGradient:
    """rho A over the sequences that pass, divided by all of them."""
    return PolicyGradient(
        surrogate=importance(token_ratio),
        advantage=advantage.piece,
        aggregate=mean_over_sequences_of_sums,
        gates=gates,
        reads=reads,
    )
