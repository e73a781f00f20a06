"""Numbers of GSPO, LUSPO, MiniRL, M2PO, TBRM and of verl's losses with three policies."""

from dataclasses import replace

import pytest
import torch

from learner.objectives.advantages import no_baseline
from learner.objectives.aggregation import mean_over_tokens
from learner.objectives.composition import PolicyGradient
from learner.objectives.gates import bounded_second_moment
from learner.objectives.ratios import (
    proximal_ratio,
    proximal_to_behavior,
    sequence_product,
    sequence_ratio,
    soft_clip,
    truncated,
)
from learner.objectives.recipes import build_objective
from learner.objectives.surrogates import score, weighted
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import gradient, one_batch, padded
from tests.worked_examples.test_reval import EXAMPLE_1, EXAMPLE_1_REFERENCE, leaves, trajectories

WIDE = ([1.02, 0.97, 1.05], [0.90, 1.10, 1.00, 0.95, 0.98])
TIGHT = ([1.0003, 0.9998, 1.0004], [0.9999, 1.0002, 0.9996, 1.0001, 1.0])


def two_sequences(ratios: tuple[list[float], list[float]]) -> Tokens:
    return one_batch(
        policy=[[0.5 * ratio for ratio in row] for row in ratios],
        behavior=[[0.5] * len(row) for row in ratios],
        rewards=[1.0, -1.0],
    )


@pytest.mark.parametrize(
    ("name", "ratios", "clip", "objective", "coefficients"),
    [
        ("gspo", WIDE, (3e-4, 4e-4), 0.000350, (0.0, 0.0)),
        ("luspo", WIDE, (3e-4, 4e-4), -0.998650, (0.0, 0.0)),
        ("gspo", WIDE, (2e-3, 2.5e-3), 0.002250, (0.0, 0.0)),
        ("luspo", WIDE, (2e-3, 2.5e-3), -0.991250, (0.0, 0.0)),
        ("gspo", WIDE, (0.2, 0.28), 0.014485, (0.168799, -0.098382)),
        ("luspo", WIDE, (0.2, 0.28), -0.940369, (0.506396, -0.491912)),
        ("gspo", TIGHT, (3e-4, 4e-4), 0.000103, (0.166694, -0.099996)),
        ("luspo", TIGHT, (2e-3, 2.5e-3), -0.999650, (0.500083, -0.499980)),
    ],
)
def test_sequence_clips(
    name: str,
    ratios: tuple[list[float], list[float]],
    clip: tuple[float, float],
    objective: float,
    coefficients: tuple[float, float],
) -> None:
    tokens = two_sequences(ratios)
    options = {"advantage": "none", "clip_low": clip[0], "clip_high": clip[1]}

    total = build_objective(name, options)(tokens, {}).total

    assert -total.item() == pytest.approx(objective, abs=2e-6)
    grad = -gradient(total, tokens.logprobs)
    assert grad[0, :3].tolist() == pytest.approx([coefficients[0]] * 3, abs=2e-6)
    assert grad[1].tolist() == pytest.approx([coefficients[1]] * 5, abs=2e-6)


def test_sequence_ratio_and_product() -> None:
    tokens = cleaned(one_batch(policy=[[0.6, 0.45, 0.525, 0.65]], behavior=[[0.5] * 4], rewards=[1.0]), ())

    assert sequence_product(tokens).item() == pytest.approx(1.474200, abs=1e-6)
    assert sequence_ratio(tokens).item() == pytest.approx(1.101892, abs=1e-6)


def with_proximal(tokens: Tokens, proximal: list[list[float]]) -> Tokens:
    return replace(tokens, columns={Column.PROXIMAL_LOGPROBS: padded(proximal, 1.0).log()})


@pytest.mark.parametrize(
    ("reward", "objective", "coefficients"),
    [(0.5, -7.257209, [0.510204, 0.0, 2.5, 0.5]), (-0.5, 1.469040, [-0.510204, -0.714286, 0.0, -0.5])],
)
def test_minirl_masks_by_drift_and_weighs_by_the_sampler(
    reward: float, objective: float, coefficients: list[float]
) -> None:
    blank = one_batch(policy=[[0.50, 0.30, 0.07, 0.60]], behavior=[[0.49, 0.21, 0.012, 0.60]], rewards=[reward])
    tokens = with_proximal(blank, [[0.48, 0.20, 0.10, 0.62]])

    total = build_objective("minirl", {})(tokens, {}).total

    assert -total.item() == pytest.approx(objective, abs=2e-6)
    assert (-gradient(total, tokens.logprobs))[0].tolist() == pytest.approx(coefficients, abs=2e-6)


def test_m2po_keeps_everything_below_the_threshold() -> None:
    tokens = cleaned(one_batch(policy=[[0.6, 0.4, 0.5, 0.55]], behavior=[[0.5] * 4], rewards=[1.0]), ())

    kept = [bounded_second_moment(threshold=t)(tokens, torch.ones(1, 1)).all().item() for t in (0.04, 0.02304, 0.02302)]

    assert kept == [True, True, False]  # the mean of the squares is 0.023030


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.04, [True, False, True, False]), (0.2, [True, True, True, False]), (0.5, [True, True, True, True])],
)
def test_m2po_on_the_squares_of_public_code(threshold: float, kept: list[bool]) -> None:
    squares = torch.tensor([[0.009084, 0.480453, 0.000610, 1.206949]])
    tokens = replace(
        one_batch(policy=[[0.5] * 4], behavior=[[0.5] * 4], rewards=[1.0]),
        logprobs=squares.sqrt(),
        behavior_logprobs=torch.zeros(1, 4),
    )

    assert bounded_second_moment(threshold=threshold)(tokens, torch.ones(1, 1))[0].tolist() == kept


def three_policies() -> Tokens:
    """verl's example; the last token of the second row is masked."""
    blank = one_batch(
        policy=[[0.7, 0.38, 0.82], [0.2, 0.9, 0.6]],
        behavior=[[0.5, 0.4, 0.8], [0.3, 0.2, 0.6]],
        rewards=[1.0, -0.5],
        mask=[[1, 1, 1], [1, 1, 0]],
    )
    return with_proximal(blank, [[0.5, 0.38, 0.8], [0.3, 0.25, 0.6]])


@pytest.mark.parametrize(("dual_clip", "loss", "last"), [(3.0, -0.241, 0.0), (float("inf"), -0.175, 0.396)])
def test_tis_ppo_on_the_example_of_verl(dual_clip: float, loss: float, last: float) -> None:
    tokens = three_policies()

    total = build_objective("tis_ppo", {"advantage": "none", "cap": 1.1, "dual_clip": dual_clip})(tokens, {}).total

    assert total.item() == pytest.approx(loss, abs=1e-6)
    found = gradient(total, tokens.logprobs).tolist()
    assert found == [pytest.approx([0.0, -0.19, -0.205], abs=1e-6), pytest.approx([0.0, last, 0.0], abs=1e-6)]


def test_a_soft_clip_on_the_drift_times_a_truncated_weight_is_verls_cispo() -> None:
    tokens = cleaned(three_policies(), {Column.PROXIMAL_LOGPROBS})
    policy = PolicyGradient(
        surrogate=weighted(
            score(soft_clip(proximal_ratio, low=0.2, high=0.28)), truncated(proximal_to_behavior, cap=1.1)
        ),
        advantage=no_baseline,
        aggregate=mean_over_tokens,
    )

    total = policy(tokens, {}).loss

    assert total.item() == pytest.approx(0.172242, abs=1e-6)
    assert gradient(total, tokens.logprobs).tolist() == [
        pytest.approx([-0.256, -0.19, -0.205], abs=1e-6),
        pytest.approx([0.08, 0.1408, 0.0], abs=1e-6),
    ]


def test_icepop_band_on_the_example_of_verl() -> None:
    # behaviour and trainer probabilities of three sequences; the two worst tokens leave the band .5 to 5
    trainer = [[0.52, 0.38, 0.81, 0.9], [0.3, 0.05, 0.66], [0.9, 0.001]]
    blank = one_batch(
        policy=trainer, behavior=[[0.5, 0.4, 0.8, 0.9], [0.3, 0.2, 0.6], [0.9, 0.9]], rewards=[1.0, 1.0, 1.0]
    )
    tokens = with_proximal(blank, trainer)

    loss = build_objective("icepop", {"advantage": "none"})(tokens, {})

    assert (loss.gates["band"] & tokens.mask).tolist() == [
        [True, True, True, True],
        [True, False, True, False],
        [True, False, False, False],
    ]
    # weights 1.04, .95, 1.0125, 1 and 1, 0, 1.1 and 1, 0 at pi = prox
    assert -loss.total.item() == pytest.approx((4.0025 / 4 + 2.1 / 3 + 1.0 / 2) / 3, abs=1e-6)


def test_tbrm_example_1() -> None:
    policy = leaves(EXAMPLE_1)
    tokens = trajectories(policy, leaves(EXAMPLE_1_REFERENCE), [(0, 2), (1, 1)], [1.0, 0.0], group=[0, 1])

    loss = build_objective("tbrm", {"beta": 0.5})(tokens, {})

    assert loss.watched["bellman_residual"].tolist() == pytest.approx([-1.408087, 0.978666], abs=2e-6)
    assert loss.total.item() == pytest.approx(1.470247, abs=2e-6)
    expected = {
        (): [-1.408087, 0.978666, 0.0],
        (0,): [0.936717, 0.344599, -1.281316],
        (1,): [-0.343820, 0.514557, -0.170736],
    }
    for state, values in expected.items():
        assert gradient(loss.total, policy[state]).tolist() == pytest.approx(values, abs=2e-6)


def test_tbrm_example_2_is_a_fixed_point() -> None:
    policy = leaves({(): [0.998057, -1.101943, -1.201943]})
    tokens = trajectories(policy, leaves({(): [0.2, 0.1, 0.0]}), [(0,), (1,), (2,)], [1.0, 0.0, 0.0], group=[0, 1, 2])

    total = build_objective("tbrm", {"beta": 0.5})(tokens, {}).total

    assert total.item() == pytest.approx(0.0, abs=1e-10)
    assert policy[()].logsumexp(-1).item() == pytest.approx(1.207718, abs=1e-6)
