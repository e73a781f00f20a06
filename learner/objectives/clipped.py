"""PPO's clip as a term: the surrogate, and the gates that its shape implies."""

import math
from collections.abc import Mapping

from learner.objectives.composition import PolicyGradient
from learner.objectives.gates import inside_clip, inside_dual_clip
from learner.objectives.objective import Advantage, Gate, Reduction, TokenPiece
from learner.objectives.ratios import token_ratio
from learner.objectives.surrogates import dual_clip, hard_clip, weighted
from learner.tokens import Column

NO_CLIPS: Mapping[str, Gate] = {}


def clipped_policy(
    *,
    low: float,
    high: float,
    advantage: Advantage,
    aggregate: Reduction,
    ratio: TokenPiece = token_ratio,
    dual_floor: float = math.inf,
    weight: TokenPiece | None = None,
    clips: Mapping[str, Gate] = NO_CLIPS,
    coefficient: float = 1.0,
    reads: frozenset[Column] = frozenset(),
) -> PolicyGradient:
    """coefficient * aggregate(-s(weight) * min(ratio A, clip(ratio, 1 - low, 1 + high) A)).

    A `dual_floor` of inf is no dual clip; `clips` are what the weight closes.
    """
    surrogate = hard_clip(ratio, low=low, high=high)
    implied: dict[str, Gate] = {"clip": inside_clip(ratio, low=low, high=high)}
    if math.isfinite(dual_floor):
        surrogate = dual_clip(surrogate, floor=dual_floor)
        implied["dual_clip"] = inside_dual_clip(ratio, floor=dual_floor)
    return PolicyGradient(
        surrogate=weighted(surrogate, weight) if weight else surrogate,
        advantage=advantage,
        aggregate=aggregate,
        clips={**implied, **clips},
        coefficient=coefficient,
        reads=reads,
    )
