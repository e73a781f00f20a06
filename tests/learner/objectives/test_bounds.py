"""Every bound holds on enumerated policies, where the error of the surrogate is known exactly."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from learner.objectives.bounds import adaptive, coupling, error_bounds, pinsker_marginal_kl

Sequence = tuple[int, ...]
Table = dict[Sequence, list[float]]
"""Context -> probability of each next token."""

profile = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Game:
    """Two tabular policies over T tokens of V, and a reward in [0, 1] for each sequence."""

    length: int
    behavior: Table
    policy: Table
    reward: dict[Sequence, float]

    def law(self, table: Table, sequence: Sequence) -> float:
        return math.prod(table[sequence[:t]][token] for t, token in enumerate(sequence))

    def expected(self, value: Callable[[Sequence], float], table: Table) -> float:
        return sum(self.law(table, sequence) * value(sequence) for sequence in self.reward)

    def ratio(self, sequence: Sequence, t: int) -> float:
        return self.policy[sequence[:t]][sequence[t]] / self.behavior[sequence[:t]][sequence[t]]

    @property
    def error(self) -> float:
        """J(pi) - J(behavior) - L, from the definition."""

        def surrogate(sequence: Sequence) -> float:
            return self.reward[sequence] * sum(self.ratio(sequence, t) - 1 for t in range(self.length))

        gain = self.expected(self.reward.__getitem__, self.policy) - self.expected(
            self.reward.__getitem__, self.behavior
        )
        return gain - self.expected(surrogate, self.behavior)

    @property
    def error_by_identity(self) -> float:
        """-E_behavior[R sum_t (rho_t - 1) (1 - prod_{j > t} rho_j)]."""

        def lost(sequence: Sequence) -> float:
            ratios = [self.ratio(sequence, t) for t in range(self.length)]
            return self.reward[sequence] * sum(
                (ratio - 1) * (1 - math.prod(ratios[t + 1 :])) for t, ratio in enumerate(ratios)
            )

        return -self.expected(lost, self.behavior)

    def bounds(self) -> dict[str, float]:
        def tv(context: Sequence) -> float:
            pairs = zip(self.behavior[context], self.policy[context], strict=True)
            return sum(abs(p - q) for p, q in pairs) / 2

        def kl(context: Sequence) -> float:
            pairs = zip(self.behavior[context], self.policy[context], strict=True)
            return sum(p * math.log(p / q) for p, q in pairs)

        mean_tv = [self.expected(lambda y, t=t: tv(y[:t]), self.behavior) for t in range(self.length)]  # type: ignore[misc]  # t is bound
        law_tv = sum(abs(self.law(self.policy, y) - self.law(self.behavior, y)) for y in self.reward) / 2
        return dict(
            error_bounds(
                max_tv=max(map(tv, self.behavior)),
                max_kl=max(map(kl, self.behavior)),
                sequence_kl=self.expected(lambda y: sum(kl(y[:t]) for t in range(self.length)), self.behavior),
                sequence_tv=law_tv,
                mean_tv=torch.tensor(mean_tv, dtype=torch.float64),
            )
        )


@st.composite
def games(draw: st.DrawFn) -> Game:
    """Policies a small or a large step apart, none with a probability of 0."""
    vocabulary, length = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([0.05, 0.5, 3.0]))
    logit = st.floats(-1, 1)
    behavior: Table = {}
    policy: Table = {}
    for t in range(length):
        for context in itertools.product(range(vocabulary), repeat=t):
            logits = draw(st.lists(logit, min_size=vocabulary, max_size=vocabulary))
            moves = draw(st.lists(logit, min_size=vocabulary, max_size=vocabulary))
            behavior[context] = softmax(logits)
            policy[context] = softmax([z + step * m for z, m in zip(logits, moves, strict=True)])
    sequences = list(itertools.product(range(vocabulary), repeat=length))
    rewards = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(sequences), max_size=len(sequences)))
    return Game(length, behavior, policy, dict(zip(sequences, rewards, strict=True)))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


@profile
@given(game=games())
def test_every_bound_holds_against_the_exact_error(game: Game) -> None:
    assert game.error == pytest.approx(game.error_by_identity, abs=1e-9)
    bounds = game.bounds()

    for name, bound in bounds.items():
        assert abs(game.error) <= bound + 1e-9, name
    assert bounds["adaptive"] <= min(bounds["pm_tv"], bounds["coupling"]) + 1e-9
    assert bounds["pm_tv"] <= bounds["pm_kl"] + 1e-9
    assert bounds["mix_tv"] <= bounds["mix_kl"] + 1e-9
    assert bounds["best"] == min(value for name, value in bounds.items() if name not in ("best", "classical"))


def test_the_adaptive_bound_holds_both_of_its_branches() -> None:
    delta = 0.02
    flat = torch.full((5,), math.sqrt(delta / 2), dtype=torch.float64)

    # a total variation of 1 switches the linear branch off but for the last token, a KL of 1e9 the square root
    assert adaptive(mean_tv=flat, max_tv=1.0, max_kl=delta) == pytest.approx(
        pinsker_marginal_kl(length=5, max_kl=delta)
    )
    flat = torch.full((5,), 0.1, dtype=torch.float64)
    assert adaptive(mean_tv=flat, max_tv=0.1, max_kl=1e9) == pytest.approx(coupling(length=5, max_tv=0.1))


def test_bounds_saturate_and_never_exceed_four_tokens_worth() -> None:
    bounds = error_bounds(
        max_tv=1.0, max_kl=1e4, sequence_kl=1e6, sequence_tv=1.0, mean_tv=torch.ones(7, dtype=torch.float64)
    )

    assert bounds["coupling"] == bounds["pm_kl"] == bounds["pm_tv"] == bounds["adaptive"] == 4 * 6
    assert bounds["mix_kl"] == bounds["mix_tv"] == 4 * 7


def test_one_token_has_no_error() -> None:
    bounds = error_bounds(
        max_tv=0.5, max_kl=1.0, sequence_kl=1.0, sequence_tv=0.5, mean_tv=torch.full((1,), 0.5, dtype=torch.float64)
    )

    assert bounds["best"] == bounds["classical"] == 0.0
