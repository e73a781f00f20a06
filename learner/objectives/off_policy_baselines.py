"""The recipes that people compare with on data that the policy did not draw just now."""

import math
from typing import Annotated, ClassVar

from pydantic import Field

from learner.objectives.advantages import group_mean, shifted
from learner.objectives.aggregation import (
    mean_over_sequences,
    mean_over_sequences_of_means,
    mean_over_sequences_of_sums,
    mean_over_tokens,
)
from learner.objectives.bellman import TBRM_COLUMNS, tbrm_residual
from learner.objectives.clipped import clipped_policy
from learner.objectives.composition import Composition, PolicyGradient, SquaredResidual
from learner.objectives.gates import bounded_second_moment, inside_band, inside_clip
from learner.objectives.ratios import (
    banded,
    no_ratio,
    proximal_ratio,
    proximal_to_behavior,
    sequence_product,
    token_ratio,
    truncated,
)
from learner.objectives.recipe import (
    AdvantageName,
    ClipHigh,
    ClipLow,
    NonNegative,
    Number,
    Positive,
    Recipe,
    Threshold,
)
from learner.objectives.surrogates import importance, score, tapered_score
from learner.tokens import Column


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

    def objective(self) -> Composition:
        weight = truncated(token_ratio, cap=self.cap)
        return self.composed(
            PolicyGradient(surrogate=score(weight), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


class TisPpo(Recipe):
    """PPO against the trainer's own old policy, times the truncated weight of that policy over the sampler.

    Here a batch is one optimiser step, so that the old policy is the policy, r is 1 and this is `tis`.
    """

    name: ClassVar = "tis_ppo"
    paper: ClassVar = "Yao et al. 2025 (blog), the form with three policies"
    sentence: ClassVar = (
        "-1/N sum s(min(prox / behavior, cap)) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / prox"
    )
    use: ClassVar = "To compare: with one step a batch, as `stalewise learn` takes it, r = 1 and this is tis."
    denominator: ClassVar = "all tokens"

    cap: Positive = 2.0
    """Largest weight; common frameworks take 2."""
    clip_low: ClipLow = 0.2
    """PPO's. Not reached while r is 1."""
    clip_high: ClipHigh = 0.28
    """DAPO's, on which the blog builds. Not reached while r is 1."""
    dual_clip: Threshold = math.inf
    """As in grpo. Not reached while r is 1."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                weight=truncated(proximal_to_behavior, cap=self.cap),
                ratio=proximal_ratio,
                low=self.clip_low,
                high=self.clip_high,
                dual_floor=self.dual_clip,
                advantage=self.advantage.piece,
                aggregate=mean_over_tokens,
                reads=frozenset({Column.PROXIMAL_LOGPROBS}),
            )
        )


class IcePop(Recipe):
    """As tis_ppo, but a token whose weight leaves a band loses its gradient instead of being truncated.

    Here a batch is one optimiser step, so that r is 1 and k is pi / behavior: the band alone is at work.
    """

    name: ClassVar = "icepop"
    paper: ClassVar = "arXiv 2510.18855"
    sentence: ClassVar = (
        "-1/B sum_i 1/|o_i| sum_t [band_low <= k <= band_high] s(k) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),"
        " k = prox / behavior, r = pi / prox"
    )
    use: ClassVar = "A noisy engine, such as a quantised mixture of experts, whose worst tokens are better ignored."
    denominator: ClassVar = "each sequence's tokens, then all sequences"

    band_low: NonNegative = 0.5
    """The paper's."""
    band_high: Positive = 5.0
    """The paper's."""
    clip_low: ClipLow = 0.2
    """PPO's (the paper's is unknown). Not reached while r is 1."""
    clip_high: ClipHigh = 0.2
    """PPO's (the paper's is unknown). Not reached while r is 1."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                weight=banded(proximal_to_behavior, low=self.band_low, high=self.band_high),
                clips={"band": inside_band(proximal_to_behavior, low=self.band_low, high=self.band_high)},
                ratio=proximal_ratio,
                low=self.clip_low,
                high=self.clip_high,
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_means,
                reads=frozenset({Column.PROXIMAL_LOGPROBS}),
            )
        )


class M2po(Recipe):
    """No clip: the tokens that blow up the second moment of the log-ratio lose their gradient."""

    name: ClassVar = "m2po"
    paper: ClassVar = "arXiv 2510.01161"
    sentence: ClassVar = (
        "-1/N sum [kept] rho A; the largest (log rho)^2 leave until the mean of the rest is below threshold"
    )
    use: ClassVar = "Very old data at a fixed budget of drift; it sorts all tokens of the batch."
    denominator: ClassVar = "all tokens"

    threshold: Positive = 0.04
    """Of the mean of (log rho)^2, in nats squared: the value of the public configuration."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in grpo."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=importance(token_ratio),
                advantage=self.advantage.piece,
                aggregate=mean_over_tokens,
                gates={"second_moment": bounded_second_moment(threshold=self.threshold)},
            )
        )


class MiniRl(Recipe):
    """The first-order approximation of the sequence objective: truncated weights, a clip as a gate, no length norm.

    Here a batch is one optimiser step, so that r is 1 and the gate is never closed.
    """

    name: ClassVar = "minirl"
    paper: ClassVar = "arXiv 2512.01374"
    sentence: ClassVar = (
        "-1/B sum_i sum_t [r <= 1 + clip_high if A > 0, r >= 1 - clip_low if A < 0] s(min(rho, cap)) A log pi,"
        " r = pi / prox, A = reward - mean"
    )
    use: ClassVar = (
        "To compare: with one step a batch, as `stalewise learn` takes it, r = 1 and only the weight is at work."
    )
    denominator: ClassVar = "all sequences"

    cap: Positive = 5.0
    """Largest weight; the paper's."""
    clip_low: ClipLow = 0.2
    """The paper's. Not reached while r is 1."""
    clip_high: ClipHigh = 0.27
    """The paper's. Not reached while r is 1."""
    advantage: AdvantageName = AdvantageName.GROUP_MEAN
    """The method's own: no std."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=score(truncated(token_ratio, cap=self.cap)),
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_sums,
                gates={"clip": inside_clip(proximal_ratio, low=self.clip_low, high=self.clip_high)},
                reads=frozenset({Column.PROXIMAL_LOGPROBS}),
            )
        )


class AsymRe(Recipe):
    """REINFORCE on old data with a baseline below the behaviour's value: it leans on what went well."""

    name: ClassVar = "asymre"
    paper: ClassVar = "arXiv 2506.20520"
    sentence: ClassVar = "-1/N sum (r - mean - baseline_shift) log pi"
    use: ClassVar = "Data of unknown behaviour policy; no ratio is needed."
    denominator: ClassVar = "all tokens"

    baseline_shift: Annotated[Number, Field(allow_inf_nan=False)] = -0.1
    """Of the baseline, in units of reward; the paper's. At 0 all its runs collapsed."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=score(no_ratio),
                advantage=shifted(group_mean, by=-self.baseline_shift),
                aggregate=mean_over_tokens,
            )
        )


class Topr(Recipe):
    """Good answers in full, bad answers by their sequence's ratio, at most 1."""

    name: ClassVar = "topr"
    paper: ClassVar = "arXiv 2503.14286"
    sentence: ClassVar = "-1/B sum_i 1/|o_i| sum_t w A log pi, w = 1 if A >= 0 else s(min(prod_t rho, 1))"
    use: ClassVar = "Offline data with rewards of +1 and -1; a reward of 0 teaches nothing without a baseline."
    denominator: ClassVar = "each sequence's tokens, then all sequences"

    advantage: AdvantageName = AdvantageName.NONE
    """The method's own: its rewards are +1 and -1."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=tapered_score(truncated(sequence_product, cap=1.0)),
                advantage=self.advantage.piece,
                aggregate=mean_over_sequences_of_means,
            )
        )


class Opmd(Recipe):
    """The simple online policy mirror descent: REINFORCE, slowed by a temperature."""

    name: ClassVar = "opmd"
    paper: ClassVar = "arXiv 2505.17826"
    sentence: ClassVar = "-1/(N (1 + temperature)) sum (r - mean) log pi"
    use: ClassVar = "To compare with Trinity-RFT; it ignores who drew the data."
    denominator: ClassVar = "all tokens, times a constant"

    temperature: NonNegative = 1.0
    """Strength of the KL to the policy that drew the data, in units of reward; public code's."""

    def objective(self) -> Composition:
        return self.composed(
            PolicyGradient(
                surrogate=score(no_ratio),
                advantage=group_mean,
                aggregate=mean_over_tokens,
                coefficient=1.0 / (1.0 + self.temperature),
            )
        )


class Tbrm(Recipe):
    """ReVal without the reference's value: it moves even where there is no reward to learn from."""

    name: ClassVar = "tbrm"
    paper: ClassVar = "arXiv 2505.15311"
    sentence: ClassVar = "1/B sum_i [V + log pi(tau) - log pi_ref(tau) - r / beta]^2, V = logsumexp at s_1"
    use: ClassVar = "To compare with reval, which starts calibrated."
    denominator: ClassVar = "all sequences"

    beta: Positive = 0.002
    """KL strength, reward per nat; the paper's."""

    def objective(self) -> Composition:
        return self.composed(
            SquaredResidual(residual=tbrm_residual(beta=self.beta), aggregate=mean_over_sequences, columns=TBRM_COLUMNS)
        )


OFF_POLICY_BASELINES: tuple[type[Recipe], ...] = (Tis, TisPpo, IcePop, M2po, MiniRl, AsymRe, Topr, Opmd, Tbrm)
