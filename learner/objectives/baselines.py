"""The recipes that people compare with: from REINFORCE to clips on tokens and on sequences."""

import math
from typing import ClassVar

from learner.objectives.aggregation import (
    mean_over_sequences_of_means,
    mean_over_sequences_of_sums,
    mean_over_tokens,
)
from learner.objectives.clipped import clipped_policy
from learner.objectives.composition import Composition, Penalty, PolicyGradient
from learner.objectives.penalties import reference_k3
from learner.objectives.ratios import no_ratio, sequence_ratio, soft_clip, token_ratio
from learner.objectives.recipe import AdvantageName, ClipHigh, ClipLow, NonNegative, Positive, Recipe, Threshold
from learner.objectives.surrogates import score
from learner.tokens import Column


class Reinforce(Recipe):
    """The plain policy gradient: it believes that all data is its own."""

    name: ClassVar = "reinforce"
    paper: ClassVar = "Williams 1992"
    sentence: ClassVar = "-1/N sum A log pi"
    use: ClassVar = "On-policy data only; on old data it collapses."
    denominator: ClassVar = "all tokens"

    advantage: AdvantageName = AdvantageName.GROUP_MEAN
    """none gives the textbook form; the group's mean only lowers the variance."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(surrogate=score(no_ratio), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


class Rloo(Recipe):
    """REINFORCE with a leave-one-out baseline, a sequence being one action."""

    name: ClassVar = "rloo"
    paper: ClassVar = "arXiv 2402.14740"
    sentence: ClassVar = "-1/B sum_i A_i sum_t log pi, A leave-one-out"
    use: ClassVar = "On-policy data; unbiased at small group sizes."
    denominator: ClassVar = "all sequences"

    advantage: AdvantageName = AdvantageName.LEAVE_ONE_OUT
    """The method's own."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=score(no_ratio), advantage=self.advantage.piece, aggregate=mean_over_sequences_of_sums
            )
        )


class Grpo(Recipe):
    """PPO's clip with group-standardised advantages, each sequence weighing the same."""

    name: ClassVar = "grpo"
    paper: ClassVar = "arXiv 2402.03300"
    sentence: ClassVar = "1/B sum_i 1/|o_i| sum_t { -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + c k3_ref }"
    use: ClassVar = "The common baseline; slows down on old data as ratios leave the clip."
    denominator: ClassVar = "each sequence's tokens, then all sequences"

    clip_low: ClipLow = 0.2
    """PPO's."""
    clip_high: ClipHigh = 0.2
    """PPO's."""
    dual_clip: Threshold = math.inf
    """Bound on the ratio where A < 0; 3 is the default of common frameworks, inf = off as in the paper."""
    reference_kl: NonNegative = 0.0
    """c, of the KL to the reference; the paper has 0.04, practice 0, which needs no reference model."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """Sample std (n - 1) and epsilon 1e-6, as most code has it; the paper does not say which."""

    def objective(self) -> Composition:
        policy = clipped_policy(
            low=self.clip_low,
            high=self.clip_high,
            dual_floor=self.dual_clip,
            advantage=self.advantage.piece,
            aggregate=mean_over_sequences_of_means,
        )
        reference = Penalty(
            name="reference_kl",
            piece=reference_k3,
            aggregate=mean_over_sequences_of_means,
            coefficient=self.reference_kl,
            columns=frozenset({Column.UNIT_LOGPROBS, Column.REFERENCE_LOGPROBS}),
        )
        return self.composed(policy, reference) if self.reference_kl else self.composed(policy)


class DrGrpo(Recipe):
    """GRPO without its two biases: no std, no division by each sequence's own length."""

    name: ClassVar = "dr_grpo"
    paper: ClassVar = "arXiv 2503.20783"
    sentence: ClassVar = (
        "-1/(B length_tokens) sum_i sum_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), A = r - mean"
    )
    use: ClassVar = "As grpo, when wrong answers must not grow longer."
    denominator: ClassVar = "all sequences, times a constant"

    clip_low: ClipLow = 0.2
    """PPO's."""
    clip_high: ClipHigh = 0.2
    """PPO's."""
    length_tokens: Positive = 1.0
    """Constant that sums are divided by: 1 is the paper's formula, its code takes the generation budget."""
    advantage: AdvantageName = AdvantageName.GROUP_MEAN
    """The method's own."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                low=self.clip_low,
                high=self.clip_high,
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_sums,
                coefficient=1.0 / self.length_tokens,
            )
        )


class Dapo(Recipe):
    """DAPO's loss alone: a higher upper clip and one denominator for all tokens."""

    name: ClassVar = "dapo"
    paper: ClassVar = "arXiv 2503.14476"
    sentence: ClassVar = "-1/N sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)"
    use: ClassVar = "As grpo, for responses of very different lengths; dynamic sampling is not part of the loss."
    denominator: ClassVar = "all tokens"

    clip_low: ClipLow = 0.2
    """The paper's."""
    clip_high: ClipHigh = 0.28
    """The paper's: room for unlikely tokens to grow."""
    dual_clip: Threshold = math.inf
    """As in grpo."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                low=self.clip_low,
                high=self.clip_high,
                dual_floor=self.dual_clip,
                advantage=self.advantage.piece,
                aggregate=mean_over_tokens,
            )
        )


class Gspo(Recipe):
    """PPO's clip on the geometric mean of a sequence's ratios: a sequence is kept or clipped as a whole."""

    name: ClassVar = "gspo"
    paper: ClassVar = "arXiv 2507.18071"
    sentence: ClassVar = "-1/B sum_i min(q A, clip(q, 1 - clip_low, 1 + clip_high) A), q = exp(mean_t log rho)"
    use: ClassVar = "Mixture-of-experts models near the sampler, where single tokens' ratios are noise."
    denominator: ClassVar = "all sequences"

    clip_low: ClipLow = 3e-4
    """The paper's: a mean over a sequence hardly moves."""
    clip_high: ClipHigh = 4e-4
    """The paper's."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                ratio=sequence_ratio,
                low=self.clip_low,
                high=self.clip_high,
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_means,
            )
        )


class Luspo(Recipe):
    """GSPO, each sequence times its length."""

    name: ClassVar = "luspo"
    paper: ClassVar = "arXiv 2602.05261"
    sentence: ClassVar = "-1/B sum_i |o_i| min(q A, clip(q, 1 - clip_low, 1 + clip_high) A), q = exp(mean_t log rho)"
    use: ClassVar = "As gspo, when responses should be free to grow; the loss scales with length, so retune the rate."
    denominator: ClassVar = "all sequences"

    clip_low: ClipLow = 2e-3
    """The paper's."""
    clip_high: ClipHigh = 2.5e-3
    """The paper's."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                ratio=sequence_ratio,
                low=self.clip_low,
                high=self.clip_high,
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_sums,
            )
        )


class Cispo(Recipe):
    """The token ratio as a bounded weight: no token loses its gradient."""

    name: ClassVar = "cispo"
    paper: ClassVar = "arXiv 2506.13585"
    sentence: ClassVar = "-1/N sum s(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi"
    use: ClassVar = "Long responses, a few updates old; collapses on older data."
    denominator: ClassVar = "all tokens"

    clip_low: ClipLow = 1.0
    """1 = no floor, as the paper runs it."""
    clip_high: ClipHigh = 0.28
    """Weights stay below 1 + this: the relative convention; others state the cap itself, 1.28."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        weight = soft_clip(token_ratio, low=self.clip_low, high=self.clip_high)
        return self.composed(
            PolicyGradient(surrogate=score(weight), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


BASELINES: tuple[type[Recipe], ...] = (Reinforce, Rloo, Grpo, DrGrpo, Dapo, Gspo, Luspo, Cispo)
