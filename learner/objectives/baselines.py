"""The recipes that people compare with, each a sentence of pieces."""

import math
from typing import ClassVar

from learner.objectives.aggregation import mean_over_sequences_of_means, mean_over_tokens
from learner.objectives.composition import Penalty, PolicyGradient, Term
from learner.objectives.gates import inside_clip
from learner.objectives.objective import Objective, Reduction
from learner.objectives.penalties import reference_k3
from learner.objectives.ratios import no_ratio, token_ratio, truncated
from learner.objectives.recipe import AdvantageName, ClipHigh, ClipLow, NonNegative, Positive, Recipe, Threshold
from learner.objectives.surrogates import dual_clip, hard_clip, score
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

    def objective(self) -> Objective:
        return self.composed(
            PolicyGradient(surrogate=score(no_ratio), advantage=self.advantage.piece, aggregate=mean_over_tokens)
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

    def objective(self) -> Objective:
        policy = _clipped(self.clip_low, self.clip_high, self.dual_clip, self.advantage, mean_over_sequences_of_means)
        if not self.reference_kl:
            return self.composed(policy)
        return self.composed(policy, _reference_kl(self.reference_kl, mean_over_sequences_of_means))


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

    def objective(self) -> Objective:
        return self.composed(_clipped(self.clip_low, self.clip_high, self.dual_clip, self.advantage, mean_over_tokens))


class Tis(Recipe):
    """Truncated importance sampling of each token: the unbiased weight with a cap, blind to the prefix."""

    name: ClassVar = "tis"
    paper: ClassVar = "Yao et al. 2025 (blog)"
    sentence: ClassVar = "-1/N sum s(min(rho, cap)) A log pi"
    use: ClassVar = "A small gap between engine and trainer; against minpro it isolates the prefix factor."
    denominator: ClassVar = "all tokens"

    cap: Positive = 2.0
    """Largest weight; common frameworks take 2."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Objective:
        weight = truncated(token_ratio, cap=self.cap)
        return self.composed(
            PolicyGradient(surrogate=score(weight), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


def _clipped(low: float, high: float, floor: float, advantage: AdvantageName, aggregate: Reduction) -> Term:
    surrogate = hard_clip(token_ratio, low=low, high=high)
    return PolicyGradient(
        surrogate=surrogate if math.isinf(floor) else dual_clip(surrogate, floor=floor),
        advantage=advantage.piece,
        aggregate=aggregate,
        clips={"clip": inside_clip(token_ratio, low=low, high=high)},
    )


def _reference_kl(coefficient: float, aggregate: Reduction) -> Term:
    return Penalty(
        name="reference_kl",
        piece=reference_k3,
        aggregate=aggregate,
        coefficient=coefficient,
        columns=frozenset({Column.UNIT_LOGPROBS, Column.REFERENCE_LOGPROBS}),
    )


BASELINES: tuple[type[Recipe], ...] = (Reinforce, Grpo, Dapo, Tis)
