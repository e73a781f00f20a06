"""The methods for old data, each a sentence of pieces, and the registry of all recipes."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import ValidationError

from buffer.errors import InvalidSettings
from learner.objectives.aggregation import (
    mean_over_sequences,
    mean_over_tokens,
)
from learner.objectives.baselines import BASELINES
from learner.objectives.bellman import REVAL_COLUMNS, reval_residual
from learner.objectives.clipped import clipped_policy
from learner.objectives.composition import Composition, PolicyGradient, SquaredResidual
from learner.objectives.off_policy_baselines import OFF_POLICY_BASELINES
from learner.objectives.r2vpo import R2vpo, R2vpoFresh
from learner.objectives.ratios import (
    capped_prefix_ratio,
    prefix_ratio,
    soft_clip,
)
from learner.objectives.recipe import (
    AdvantageName,
    CentringName,
    ClipHigh,
    ClipLow,
    Positive,
    Recipe,
)
from learner.objectives.stalewise import Stalewise
from learner.objectives.surrogates import score
from learner.objectives.trust_region import TRUST_REGION_RECIPES


class MinPro(Recipe):
    """The least likely earlier token stands for the whole prefix."""

    name: ClassVar = "minpro"
    paper: ClassVar = "arXiv 2601.22718"
    sentence: ClassVar = "-1/N sum s(clip(min_{i<t} rho_i * rho_t, 1 - clip_low, 1 + clip_high)) A log pi"
    use: ClassVar = "Stale data whose early tokens the policy has unlearnt."
    denominator: ClassVar = "all tokens"

    clip_low: ClipLow = 1.0
    """Weights stay above 1 - this; 1 = no floor, so that a bad prefix can be suppressed altogether (derived)."""
    clip_high: ClipHigh = 0.28
    """Weights stay below 1 + this; the paper's value is unknown, this is its lineage's (derived)."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """Group-normalised, as in GRPO."""

    def objective(self) -> Composition:
        weight = soft_clip(prefix_ratio, low=self.clip_low, high=self.clip_high)
        return self.composed(
            PolicyGradient(surrogate=score(weight), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


class MinProCapped(Recipe):
    """MinPRO with the prefix minimum capped at 1: ours."""

    name: ClassVar = "minpro_capped"
    paper: ClassVar = "ours, after arXiv 2601.22718"
    sentence: ClassVar = "-1/N sum s(clip(min(1, min_{i<t} rho_i) * rho_t, 1 - clip_low, 1 + clip_high)) A log pi"
    use: ClassVar = "As minpro, when a prefix that became likelier must not amplify what follows."
    denominator: ClassVar = "all tokens"

    clip_low: ClipLow = 1.0
    """As in minpro."""
    clip_high: ClipHigh = 1.0
    """Weights stay below 2 (ours)."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in minpro."""

    def objective(self) -> Composition:
        weight = soft_clip(capped_prefix_ratio, low=self.clip_low, high=self.clip_high)
        return self.composed(
            PolicyGradient(surrogate=score(weight), advantage=self.advantage.piece, aggregate=mean_over_tokens)
        )


class MinProHard(Recipe):
    """PPO's clip on the prefix ratio, as public third-party code has it."""

    name: ClassVar = "minpro_hard"
    paper: ClassVar = "third-party variant of arXiv 2601.22718"
    sentence: ClassVar = "-1/N sum min(q A, clip(q, 1 - clip_low, 1 + clip_high) A), q = s(min_{i<t} rho_i) * rho_t"
    use: ClassVar = "To compare with public code; with A < 0 it drops everything after one bad token."
    denominator: ClassVar = "all tokens"

    clip_low: ClipLow = 0.2
    """PPO's, as in the public code."""
    clip_high: ClipHigh = 0.28
    """DAPO's, as in the public code."""
    advantage: AdvantageName = AdvantageName.STANDARDISED
    """As in minpro."""

    def objective(self) -> Composition:
        return self.composed(
            clipped_policy(
                ratio=prefix_ratio,
                low=self.clip_low,
                high=self.clip_high,
                advantage=self.advantage.piece,
                aggregate=mean_over_tokens,
            )
        )


class ReVal(Recipe):
    """Logits are Q-values: the squared trajectory-level Bellman residual, with no ratio and no clip."""

    name: ClassVar = "reval"
    paper: ClassVar = "arXiv 2603.23355"
    sentence: ClassVar = "1/B sum_i [V - V_ref + log pi(tau) - log pi_ref(tau) - r / beta]^2, V = logsumexp at s_1"
    use: ClassVar = "Data of any age: the behaviour policy does not enter; needs a reference model."
    denominator: ClassVar = "all sequences"

    beta: Positive = 0.02
    """KL strength, reward per nat; beta x response length near 10 in the paper's runs: 600 tokens here."""
    centring: CentringName = CentringName.GROUP_MEAN
    """Of the reward; group_mean, the paper's best, learns at beta G / (G - 1), leave_one_out at beta itself."""
    scale_by_beta: bool = False
    """Multiply the residual by beta: the same minimiser, a loss in units of reward squared."""

    def objective(self) -> Composition:
        return self.composed(
            SquaredResidual(
                residual=reval_residual(beta=self.beta, centred=self.centring.advantage.piece),
                aggregate=mean_over_sequences,
                coefficient=self.beta**2 if self.scale_by_beta else 1.0,
                columns=REVAL_COLUMNS,
            )
        )


STALE_DATA_RECIPES: tuple[type[Recipe], ...] = (
    Stalewise,
    MinPro,
    MinProCapped,
    MinProHard,
    *TRUST_REGION_RECIPES,
    R2vpo,
    R2vpoFresh,
    ReVal,
)

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (*STALE_DATA_RECIPES, *OFF_POLICY_BASELINES, *BASELINES)
}


def recipe_named(name: str) -> type[Recipe]:
    """Return a registered recipe. Raises InvalidSettings for an unknown name."""
    if name not in RECIPES:
        raise InvalidSettings(f"there is no objective {name!r}", hint=f"choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]


def build_objective(name: str, options: Mapping[str, object]) -> Composition:
    """Build the recipe `name` with its options; those left out keep their defaults.

    Raises InvalidSettings for an unknown name, an unknown option, or a value that is out of bounds.
    """
    recipe = recipe_named(name)
    try:
        return recipe.model_validate(dict(options)).objective()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = f"its options are {', '.join(recipe.model_fields)}"
            raise InvalidSettings(f"objective {name} has no option {option!r}", hint=hint) from None
        seen = f" {option}={problem['input']!r}" if option else ""
        raise InvalidSettings(f"objective {name}{seen}: {problem['msg']}") from None
