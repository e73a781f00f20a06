"""R2VPO: the variance of the ratio is a constraint, driven by the whole batch or by its fresh tokens alone."""

from typing import ClassVar, Self

from pydantic import model_validator

from learner.objectives.aggregation import mean_over_tokens
from learner.objectives.composition import Composition, Constraint, PolicyGradient
from learner.objectives.multipliers import FRESH_UPDATES, DualAscent
from learner.objectives.penalties import ratio_variance
from learner.objectives.ratios import bounded_ratio
from learner.objectives.recipe import AdvantageName, NonNegative, Positive, Recipe, Share, Updates
from learner.objectives.surrogates import importance


class R2vpo(Recipe):
    """No clip: the variance of the ratio is a constraint, and its multiplier is learnt."""

    name: ClassVar = "r2vpo"
    paper: ClassVar = "arXiv 2601.03320, 2605.26784"
    sentence: ClassVar = (
        "1/N sum [-rho A + lambda (rho - 1)^2]; lambda <- clip(lambda + dual_step (V - target), 0, lambda_max)"
    )
    use: ClassVar = "Moderately old data whose surprising good tokens should keep their gradient."
    denominator: ClassVar = "all tokens"

    target_variance: Positive = 0.04
    """Of the ratio: about twice the KL radius, in nats (derived: the paper's is unknown)."""
    lambda_start: NonNegative = 0.04
    """Where the one public implementation fixes the multiplier."""
    lambda_max: NonNegative = 0.1
    """At 1 a few tokens owned the gradient of a small model; raise it when the multiplier is shown as saturated."""
    dual_step: NonNegative = 0.02
    """Change of the multiplier per unit of excess variance (derived). 0 = a fixed multiplier."""
    dual_decay: Share = 0.0
    """Of the average of V that drives the multiplier; 0 = the batch alone."""
    max_log_ratio: Positive = 5.0
    """Bound on |log rho|, in nats: the penalty's gradient grows like rho^2 (derived)."""
    fresh_updates: Updates = FRESH_UPDATES
    """Age up to which a token counts as fresh, in the reports alone; 1 = this policy's or the one before's."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """Critic-free and group-normalised (derived from its baselines)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"lambda_start={self.lambda_start} is above lambda_max={self.lambda_max}")
        return self

    def objective(self) -> Composition:
        return _constrained(self, fresh_only=False)


class R2vpoFresh(Recipe):
    """R2VPO, its multiplier driven by the fresh tokens alone: ours."""

    name: ClassVar = "r2vpo_fresh"
    paper: ClassVar = "ours, after arXiv 2601.03320"
    sentence: ClassVar = (
        "1/N sum [-rho A + lambda (rho - 1)^2]; lambda <- clip(lambda + dual_step (V_fresh - target), 0, lambda_max)"
    )
    use: ClassVar = "As r2vpo, when old data would hold the multiplier at its maximum whatever the policy does."
    denominator: ClassVar = "all tokens"

    target_variance: Positive = 0.04
    """As in r2vpo, of the fresh tokens."""
    lambda_start: NonNegative = 0.04
    """As in r2vpo."""
    lambda_max: NonNegative = 0.1
    """As in r2vpo."""
    dual_step: NonNegative = 0.02
    """As in r2vpo."""
    dual_decay: Share = 0.0
    """As in r2vpo."""
    max_log_ratio: Positive = 5.0
    """As in r2vpo."""
    fresh_updates: Updates = FRESH_UPDATES
    """Age up to which a token drives the multiplier; 1 = drawn by this policy or by the one before (ours)."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in r2vpo."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"lambda_start={self.lambda_start} is above lambda_max={self.lambda_max}")
        return self

    def objective(self) -> Composition:
        return _constrained(self, fresh_only=True)


def _constrained(recipe: R2vpo | R2vpoFresh, *, fresh_only: bool) -> Composition:
    ratio = bounded_ratio(max_log_ratio=recipe.max_log_ratio)
    variance = ratio_variance(ratio)
    dual = DualAscent(
        name="variance",
        statistic=variance,
        advantage=recipe.advantage.piece,
        target=recipe.target_variance,
        step=recipe.dual_step,
        start=recipe.lambda_start,
        maximum=recipe.lambda_max,
        decay=recipe.dual_decay,
        fresh_updates=recipe.fresh_updates,
        fresh_only=fresh_only,
    )
    return recipe.composed(
        PolicyGradient(
            surrogate=importance(ratio),
            advantage=recipe.advantage.piece,
            aggregate=mean_over_tokens,
        ),
        Constraint(piece=variance, aggregate=mean_over_tokens, dual=dual),
        dual=dual,
    )
