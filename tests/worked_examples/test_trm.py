"""arXiv 2512.23075: its masks, exact and on sample stand-ins, their length-neutral forms, and the denominator."""

from dataclasses import replace

import pytest
import torch

from learner.divergence import kl_divergence, total_variation
from learner.objectives.acceptance import acceptance_curve
from learner.objectives.aggregation import maximum_by_sequence, mean_by_sequence
from learner.objectives.gates import sequence_maximum, sequence_mean
from learner.objectives.ratios import k2, k3, sequence_ratio, token_ratio
from learner.objectives.recipes import build_objective
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import gradient, one_batch

# verl's example: three sequences, sampler and trainer probabilities
ROLLOUT = [[0.5, 0.4, 0.8, 0.9], [0.3, 0.2, 0.6], [0.9, 0.9]]
TRAINER = [[0.52, 0.38, 0.81, 0.9], [0.3, 0.05, 0.66], [0.9, 0.001]]


def three_sequences(rewards: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Tokens:
    return one_batch(policy=TRAINER, behavior=ROLLOUT, rewards=list(rewards))


def test_example_1_statistics_and_thresholds() -> None:
    tokens = cleaned(one_batch(policy=[[0.6, 0.25, 0.05]], behavior=[[0.7, 0.2, 0.05]], rewards=[1.0]), ())
    advantage = torch.ones(1, 1)

    assert token_ratio(tokens)[0].tolist() == pytest.approx([0.857143, 1.25, 1.0], abs=1e-6)
    assert k2(tokens)[0].tolist() == pytest.approx([0.011881, 0.024897, 0.0], abs=1e-6)
    assert k3(tokens)[0].tolist() == pytest.approx([0.011294, 0.026856, 0.0], abs=1e-6)
    assert mean_by_sequence(tokens, k3(tokens)).item() == pytest.approx(0.012717, abs=1e-6)
    kept = [sequence_maximum(k2, threshold=t)(tokens, advantage).item() for t in (0.026, 0.02, 0.03)]
    assert kept == [True, False, True]
    assert sequence_ratio(tokens).item() == pytest.approx(1.023264, abs=1e-6)


def with_rows(behavior: list[list[float]], policy: list[list[float]], drawn: list[int]) -> Tokens:
    """One sequence of whole distributions, its exact divergences filled in."""
    tokens = one_batch(
        policy=[[row[v] for row, v in zip(policy, drawn, strict=True)]],
        behavior=[[row[v] for row, v in zip(behavior, drawn, strict=True)]],
        rewards=[1.0],
    )
    rows = torch.tensor(behavior).log(), torch.tensor(policy).log()
    columns = {Column.EXACT_KL: kl_divergence(*rows)[None], Column.EXACT_TV: total_variation(*rows)[None]}
    return replace(tokens, columns=columns)


EXAMPLE_1 = with_rows(
    [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.9, 0.05, 0.05]],
    [[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.85, 0.05, 0.1]],
    [0, 2, 1],
)
EXAMPLE_2 = with_rows([[0.98, 0.01, 0.01], [0.6, 0.3, 0.1]], [[0.98, 0.01, 0.01], [0.3, 0.6, 0.1]], [0, 0])


def accepts(tokens: Tokens, **options: object) -> bool:
    gates = build_objective("trm", {"max_k2": "inf", **options})(tokens, {}).gates.values()
    return all(bool(gate.all()) for gate in gates)


def test_example_1_exact_and_sample_masks_disagree_between_their_statistics() -> None:
    assert EXAMPLE_1.columns[Column.EXACT_KL][0].tolist() == pytest.approx([0.026812, 0.010068, 0.016785], abs=1e-6)
    assert EXAMPLE_1.columns[Column.EXACT_KL].mean().item() == pytest.approx(0.017888, abs=1e-6)
    assert EXAMPLE_1.columns[Column.EXACT_TV][0].tolist() == pytest.approx([0.1, 0.05, 0.05], abs=1e-6)
    assert [accepts(EXAMPLE_1, max_kl=delta) for delta in (0.02, 0.026, 0.03)] == [False, False, True]
    assert [accepts(EXAMPLE_1, max_k2=delta) for delta in (0.02, 0.026, 0.03)] == [False, True, True]
    assert [accepts(EXAMPLE_1, mean_kl=delta) for delta in (0.0178, 0.0179)] == [False, True]
    assert [accepts(EXAMPLE_1, max_kl=0.03, mean_kl=delta) for delta in (0.0178, 0.0179)] == [False, True]


def test_example_2_the_sample_accepts_what_the_distribution_rejects() -> None:
    assert EXAMPLE_2.columns[Column.EXACT_KL][0].tolist() == pytest.approx([0.0, 0.207944], abs=1e-6)
    assert accepts(EXAMPLE_2, mean_k3=0.1)
    assert not accepts(EXAMPLE_2, mean_kl=0.1)
    assert accepts(EXAMPLE_2, mean_kl=0.104)


def test_length_neutral_weights_and_the_mean_deviation() -> None:
    ratios = [1.1, 0.9, 1.02, 1.5]
    tokens = one_batch(policy=[[0.4 * r for r in ratios]], behavior=[[0.4] * 4], rewards=[1.0])

    def kept(name: str, **options: object) -> bool:
        (gate,) = build_objective(name, options)(tokens, {}).gates.values()
        return bool(gate.all())

    # w = (.122474, .1, .05, 0), W = .023247, W / Z = .085320; without the epsilon branch it would be .080706
    assert [kept("trm_ln", weighted_deviation=t) for t in (0.0853, 0.08533)] == [False, True]
    assert [kept("trm_ln", weighted_deviation=t, epsilon=1e3) for t in (0.0807, 0.08071)] == [False, True]
    # radii so wide that every weight but the last is 1: W / Z = .22 / 3
    wide = {"epsilon": 1.0, "delta": 4.0}
    assert [kept("trm_ln", weighted_deviation=t, **wide) for t in (0.0733, 0.0734)] == [False, True]
    assert [kept("trm_ser", mean_deviation=t) for t in (0.1799, 0.1801)] == [False, True]


def test_the_last_token_of_a_length_neutral_mask_is_free() -> None:
    tokens = one_batch(
        policy=[[0.4, 0.9], [0.9, 0.4], [0.9]], behavior=[[0.4, 0.1], [0.1, 0.4], [0.1]], rewards=[1.0, 1.0, 1.0]
    )

    gates = build_objective("trm_ln", {})(tokens, {}).gates

    assert gates["length_neutral"].any(-1).tolist() == [True, False, True]


def test_example_2_mean_of_k3_accepts_at_a_tenth() -> None:
    tokens = cleaned(one_batch(policy=[[0.98, 0.3]], behavior=[[0.98, 0.6]], rewards=[1.0]), ())

    assert k2(tokens)[0].tolist() == pytest.approx([0.0, 0.240227], abs=1e-6)
    assert mean_by_sequence(tokens, k3(tokens)).item() == pytest.approx(0.096574, abs=1e-6)
    assert sequence_mean(k3, threshold=0.1)(tokens, torch.ones(1, 1)).item()
    assert not sequence_mean(k3, threshold=0.0965)(tokens, torch.ones(1, 1)).item()


def test_statistics_of_three_sequences() -> None:
    tokens = cleaned(three_sequences(), ())

    largest_k2 = maximum_by_sequence(tokens, k2(tokens))[:, 0].tolist()
    assert largest_k2 == pytest.approx([0.001316, 0.960906, 23.136287], abs=2e-6)
    assert mean_by_sequence(tokens, k2(tokens))[:, 0].tolist() == pytest.approx(
        [0.000540, 0.321816, 11.568144], abs=2e-6
    )
    assert mean_by_sequence(tokens, k3(tokens))[:, 0].tolist() == pytest.approx(
        [0.000538, 0.213661, 2.901753], abs=2e-6
    )
    curve = acceptance_curve(tokens)
    assert curve["trust_region/max_k2_nats_p50_estimate"].item() == pytest.approx(0.960906, abs=2e-6)


def test_a_rejected_sequence_loses_all_its_tokens_and_the_others_keep_theirs() -> None:
    tokens, alone = three_sequences(), three_sequences()

    gated = build_objective("trm", {"max_k2": 0.05, "advantage": "none"})(tokens, {})
    free = build_objective("trm", {"max_k2": 1e9, "advantage": "none"})(alone, {})

    gradients, ungated = gradient(gated.total, tokens.logprobs), gradient(free.total, alone.logprobs)
    assert torch.equal(gradients[0], ungated[0])
    assert not gradients[1:].any()
    assert gated.gates["trust_region_max_estimate"].any(-1).tolist() == [True, False, False]


def test_the_loss_is_divided_by_all_sequences() -> None:
    # four sequences of one token with contributions 2, -1, 8, 3; the third left the trust region
    tokens = one_batch(
        policy=[[0.5], [0.5], [0.8], [0.5]], behavior=[[0.5], [0.5], [0.1], [0.5]], rewards=[2, -1, 1, 3]
    )

    total = build_objective("trm", {"max_k2": 0.05, "advantage": "none"})(tokens, {}).total

    assert -total.item() == pytest.approx(1.0, abs=1e-6)  # by the kept ones it would be 1.333333
    assert (-gradient(total, tokens.logprobs))[:, 0].tolist() == pytest.approx([0.5, -0.25, 0.0, 0.75], abs=1e-6)
