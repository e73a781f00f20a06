"""What every recipe has: options with their reasons, a sentence, and the pieces they choose."""

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from buffer.settings import Settings
from learner.objectives import advantages
from learner.objectives.composition import Composition, Term
from learner.objectives.multipliers import DualAscent
from learner.objectives.objective import Advantage
from learner.objectives.ratios import token_ratio, truncated
from learner.objectives.token_baseline import optimal_token_baseline


class Recipe(Settings, ABC):
    """A named objective: its fields are its options, `objective()` is its sentence made of pieces."""

    name: ClassVar[str]
    """What settings and the registry call it."""
    paper: ClassVar[str]
    """arXiv ids, or `ours`."""
    sentence: ClassVar[str]
    """The loss in ASCII, as the code computes it; s(x) = stop-gradient, rho = pi / behavior."""
    use: ClassVar[str]
    """One line: when to use it."""
    denominator: ClassVar[str]
    """What the loss is divided by, in words."""

    @abstractmethod
    def objective(self) -> Composition:
        """Choose the pieces."""

    def composed(self, *terms: Term, dual: DualAscent | None = None) -> Composition:
        """The objective of these terms, under this recipe's name and denominator."""
        return Composition(name=self.name, denominator=self.denominator, terms=terms, dual=dual)


class AdvantageName(StrEnum):
    NONE = "none"
    GROUP_MEAN = "group_mean"
    LEAVE_ONE_OUT = "leave_one_out"
    STANDARDISED = "standardised"
    STANDARDISED_POPULATION = "standardised_population"
    BATCH_NORMALISED = "batch_normalised"
    OPTIMAL_TOKEN_BASELINE = "optimal_token_baseline"
    OPTIMAL_TOKEN_BASELINE_TRUNCATED = "optimal_token_baseline_truncated"

    @property
    def piece(self) -> Advantage:
        """The advantage of that name.

        The epsilon 1e-6 is verl's, it only guards groups whose rewards are all equal; 2 is the usual cap of `tis`.
        """
        return _ADVANTAGES[self]


_ADVANTAGES: dict[AdvantageName, Advantage] = {
    AdvantageName.NONE: advantages.no_baseline,
    AdvantageName.GROUP_MEAN: advantages.group_mean,
    AdvantageName.LEAVE_ONE_OUT: advantages.leave_one_out,
    AdvantageName.STANDARDISED: advantages.standardised(lost_degrees=1, epsilon=1e-6),
    AdvantageName.STANDARDISED_POPULATION: advantages.standardised(lost_degrees=0, epsilon=1e-6),
    AdvantageName.BATCH_NORMALISED: advantages.batch_normalised,
    AdvantageName.OPTIMAL_TOKEN_BASELINE: optimal_token_baseline(),
    AdvantageName.OPTIMAL_TOKEN_BASELINE_TRUNCATED: optimal_token_baseline(weight=truncated(token_ratio, cap=2.0)),
}


class CentringName(StrEnum):
    GROUP_MEAN = "group_mean"
    LEAVE_ONE_OUT = "leave_one_out"
    NONE = "none"

    @property
    def advantage(self) -> AdvantageName:
        """The advantage that centres a reward this way."""
        return AdvantageName(self.value)


def _refuse_truth_values(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a truth value")
    return value


Number = Annotated[float, BeforeValidator(_refuse_truth_values)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Updates = Annotated[int, BeforeValidator(_refuse_truth_values), Field(ge=0)]
ClipLow = Annotated[Number, Field(ge=0, le=1)]
"""1 = a floor of 0, which no ratio reaches: off."""
ClipHigh = Annotated[Number, Field(gt=0)]
"""inf = off."""
Threshold = Annotated[Number, Field(gt=0)]
"""inf = off."""
Share = Annotated[Number, Field(ge=0, lt=1)]
