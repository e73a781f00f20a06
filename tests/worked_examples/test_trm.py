"""arXiv 2512.23075: the masks of its sample stand-ins, and the denominator."""

import pytest
import torch

from learner.objectives.aggregation import maximum_by_sequence, mean_by_sequence
from learner.objectives.diagnostics import acceptance_curve
from learner.objectives.gates import sequence_maximum, sequence_mean
from learner.objectives.ratios import k2, k3, token_ratio
from learner.objectives.recipes import build_objective
from learner.tokens import Tokens, cleaned
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
    assert curve["trust_region/max_k2_nats_p50"].item() == pytest.approx(0.960906, abs=2e-6)


def test_a_rejected_sequence_loses_all_its_tokens_and_the_others_keep_theirs() -> None:
    tokens, alone = three_sequences(), three_sequences()

    gated = build_objective("trm", {"max_k2": 0.05, "advantage": "none"})(tokens, {})
    free = build_objective("trm", {"max_k2": 1e9, "advantage": "none"})(alone, {})

    gradients, ungated = gradient(gated.total, tokens.logprobs), gradient(free.total, alone.logprobs)
    assert torch.equal(gradients[0], ungated[0])
    assert not gradients[1:].any()
    assert gated.gates["trust_region_max"].any(-1).tolist() == [True, False, False]


def test_the_loss_is_divided_by_all_sequences() -> None:
    # four sequences of one token with contributions 2, -1, 8, 3; the third left the trust region
    tokens = one_batch(
        policy=[[0.5], [0.5], [0.8], [0.5]], behavior=[[0.5], [0.5], [0.1], [0.5]], rewards=[2, -1, 1, 3]
    )

    total = build_objective("trm", {"max_k2": 0.05, "advantage": "none"})(tokens, {}).total

    assert -total.item() == pytest.approx(1.0, abs=1e-6)  # by the kept ones it would be 1.333333
    assert (-gradient(total, tokens.logprobs))[:, 0].tolist() == pytest.approx([0.5, -0.25, 0.0, 0.75], abs=1e-6)
