"""Gates: which tokens keep their gradient, and that a closed one leaves the denominator alone."""

import math
from dataclasses import replace

import pytest
import torch

from learner.objectives.advantages import group_mean
from learner.objectives.gates import (
    bounded_second_moment,
    inside_band,
    inside_clip,
    sequence_largest_k2,
    sequence_maximum,
    sequence_mean,
)
from learner.objectives.ratios import k2, k3, token_ratio
from learner.objectives.recipe import AdvantageName
from learner.objectives.recipes import build_objective
from tests.learner.objectives.batches import from_logs, gradient, tokens_of


def test_gates_are_monotone_in_their_threshold_and_see_trained_tokens_only() -> None:
    tokens = from_logs([[0.1, 2.0, -0.4], [0.0, 0.1, 0.2]], mask=[[1, 0, 1], [1, 1, 1]])
    advantage = torch.ones(2, 1)

    kept = [sequence_maximum(k2, threshold=t)(tokens, advantage)[:, 0].tolist() for t in (0.01, 0.03, 0.1)]

    assert kept == [[False, False], [False, True], [True, True]]
    faster = [sequence_largest_k2(threshold=t)(tokens, advantage)[:, 0].tolist() for t in (0.01, 0.03, 0.1)]
    assert faster == kept


def test_a_sequence_on_the_threshold_is_kept() -> None:
    tokens = from_logs([[0.0, 0.0]])
    largest = torch.ones(1, 1)

    assert sequence_maximum(k2, threshold=0.0)(tokens, largest).item()
    assert sequence_largest_k2(threshold=0.0)(tokens, largest).item()
    assert sequence_mean(k3, threshold=0.0)(tokens, largest).item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_open"),
    [
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.7, -1.0, False),
        (0.7, 1.0, True),
        (1.3, 0.0, True),
        (0.7, 0.0, True),
        (1.1, 1.0, True),
    ],
)
def test_inside_clip_closes_what_moved_too_far_in_its_own_direction(
    ratio: float, advantage: float, is_open: bool
) -> None:
    tokens = from_logs([[math.log(ratio)]])

    assert inside_clip(token_ratio, low=0.2, high=0.2)(tokens, torch.tensor([[advantage]])).item() is is_open


def test_a_second_moment_at_the_threshold_is_not_below_it() -> None:
    tokens = replace(
        from_logs([[0.0, 0.0, 0.0]]),
        logprobs=torch.tensor([[0.5, -0.5, 0.25]]),
        behavior_logprobs=torch.zeros(1, 3),
    )

    # squares 1/4, 1/4, 1/16: all three have the mean 3/16, and the two smallest 5/32
    for threshold, kept in ((0.25, 3), (3 / 16, 2), (5 / 32, 1), (1 / 16, 0)):
        assert bounded_second_moment(threshold=threshold)(tokens, torch.ones(1, 1)).sum().item() == kept
    alone = replace(tokens, mask=torch.tensor([[True, False, False]]))
    assert not bounded_second_moment(threshold=0.25)(alone, torch.ones(1, 1)).any()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_token_on_the_edge_of_a_clip_or_band_is_inside(advantage: float) -> None:
    tokens = from_logs([[0.0]])

    for gate in (inside_clip(token_ratio, low=0.0, high=0.0), inside_band(token_ratio, low=1.0, high=1.0)):
        assert gate(tokens, torch.tensor([[advantage]])).item()


@pytest.mark.parametrize(
    ("kl", "gate"), [("exact", "trust_region_max"), ("lower_bound", "trust_region_max_lower_bound")]
)
def test_a_gate_is_named_after_what_its_kl_proves(kl: str, gate: str) -> None:
    objective = build_objective("trm", {"max_k2": "inf", "max_kl": 0.06, "kl": kl})

    assert objective(tokens_of(), {}).gates.keys() == {gate}


@pytest.mark.parametrize(
    ("name", "options", "gates"),
    [("dapo", {}, ["clip"]), ("grpo", {"dual_clip": 1.1}, ["clip", "dual_clip"])],
)
def test_a_clip_reports_the_tokens_without_gradient(name: str, options: dict[str, object], gates: list[str]) -> None:
    tokens = tokens_of()

    loss = build_objective(name, options)(tokens, {})

    has_gradient = gradient(loss.total, tokens.logprobs) != 0
    is_open = torch.stack(list(loss.gates.values())).all(0)
    assert torch.equal(has_gradient, is_open & tokens.mask & (group_mean(tokens) != 0))
    assert list(loss.gates) == gates
    assert all((~gate & tokens.mask).any() for gate in loss.gates.values())


@pytest.mark.parametrize("options", [{"max_k2": 1e-9}, {"max_k2": 0.05}, {"max_k2": 1e9}])
def test_a_closed_gate_leaves_the_denominator_of_the_open_tokens(options: dict[str, object]) -> None:
    tokens = tokens_of()

    for name in ("trm", "stalewise"):
        loss = build_objective(name, options)(tokens, {"variance": 0.0, "variance_ema": 0.0})
        free = build_objective(name, {"max_k2": 1e9})(tokens, {"variance": 0.0, "variance_ema": 0.0})
        found, ungated = gradient(loss.total, tokens.logprobs), gradient(free.total, tokens.logprobs)
        is_open = loss.gates["trust_region_max_estimate"]
        torch.testing.assert_close(found, torch.where(is_open, ungated, 0.0), rtol=1e-6, atol=1e-9)


def test_with_the_taper_a_good_token_is_learnt_in_full_however_unlikely_it_has_become() -> None:
    tokens = tokens_of()
    advantage = AdvantageName.STANDARDISED.piece(tokens)
    good = tokens.mask & (advantage > 0)

    loss = build_objective("stalewise", {"max_k2": 1e-9})(tokens, {})

    found = gradient(loss.total, tokens.logprobs)
    torch.testing.assert_close(found[good], -(advantage.expand_as(found) / tokens.mask.sum())[good])
    assert loss.gates["trust_region_max_estimate"][good].all()
    assert not found[tokens.mask & (advantage < 0)].any()
