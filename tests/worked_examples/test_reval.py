"""arXiv 2603.23355: examples 1 to 3, from logits, so that the raw-first-logit form meets the logsumexp form."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from learner.objectives.recipes import build_objective
from learner.tokens import Column, Tokens
from tests.learner.objectives.batches import gradient

Logits = dict[tuple[int, ...], Tensor]
"""State (the tokens before it) -> raw logits."""


def trajectories(
    policy: Logits, reference: Logits, responses: Sequence[tuple[int, ...]], rewards: list[float], group: list[int]
) -> Tokens:
    """Responses of equal length in the tree that `policy` and `reference` are given on."""

    def logprobs(logits: Logits) -> Tensor:
        rows = [[logits[y[:t]].log_softmax(-1)[y[t]] for t in range(len(y))] for y in responses]
        return torch.stack([torch.stack(row) for row in rows])

    def first(logits: Logits) -> Tensor:
        return torch.stack([logits[()][y[0]] for y in responses])

    unit = logprobs(policy)
    return Tokens(
        logprobs=unit,
        behavior_logprobs=torch.full_like(unit, -9.0),  # whoever drew it: ReVal does not ask
        mask=torch.ones(unit.shape, dtype=torch.bool),
        rewards=torch.tensor(rewards),
        group=torch.tensor(group),
        episode=torch.arange(len(responses)),
        age_updates=torch.full(unit.shape, 500),
        columns={
            Column.UNIT_LOGPROBS: unit,
            Column.REFERENCE_LOGPROBS: logprobs(reference).detach(),
            Column.FIRST_LOGIT: first(policy),
            Column.REFERENCE_FIRST_LOGIT: first(reference).detach(),
        },
    )


def leaves(logits: dict[tuple[int, ...], list[float]]) -> Logits:
    return {state: torch.tensor(values).requires_grad_() for state, values in logits.items()}


EXAMPLE_1 = {(): [0.5, -0.2, 0.1], (0,): [1.0, 0.0, -1.0], (1,): [0.3, 0.6, -0.4]}
EXAMPLE_1_REFERENCE = {(): [0.2, 0.1, 0.0], (0,): [0.4, 0.3, -0.2], (1,): [0.0, 0.5, 0.1]}


def test_example_1_residuals_loss_and_gradient() -> None:
    policy = leaves(EXAMPLE_1)
    tokens = trajectories(policy, leaves(EXAMPLE_1_REFERENCE), [(0, 2), (1, 1)], [1.0, 0.0], group=[0, 1])

    loss = build_objective("reval", {"beta": 0.5, "centring": "none"})(tokens, {})

    assert loss.watched["bellman_residual"].tolist() == pytest.approx([-2.610030, -0.223277], abs=2e-6)
    assert loss.total.item() == pytest.approx(3.431054, abs=2e-6)
    expected = {
        (): [-2.610030, -0.223277, 0.0],
        (0,): [1.736299, 0.638749, -2.375047],
        (1,): [0.078441, -0.117393, 0.038953],
    }
    for state, values in expected.items():
        assert gradient(loss.total, policy[state]).tolist() == pytest.approx(values, abs=2e-6)


def test_example_1_equals_the_logsumexp_form() -> None:
    policy, reference = leaves(EXAMPLE_1), leaves(EXAMPLE_1_REFERENCE)
    tokens = trajectories(policy, reference, [(0, 2), (1, 1)], [1.0, 0.0], group=[0, 1])
    value = policy[()].logsumexp(-1) - reference[()].logsumexp(-1)
    unit, ref = tokens.columns[Column.UNIT_LOGPROBS], tokens.columns[Column.REFERENCE_LOGPROBS]
    delta = value + (unit - ref).sum(-1) - tokens.rewards / 0.5

    total = build_objective("reval", {"beta": 0.5, "centring": "none"})(tokens, {}).total

    assert total.item() == pytest.approx(delta.square().mean().item(), rel=1e-6)
    for leaf in policy.values():
        torch.testing.assert_close(gradient(total, leaf), gradient(delta.square().mean(), leaf), rtol=0, atol=2e-6)


def test_example_1_group_centred() -> None:
    tokens = trajectories(leaves(EXAMPLE_1), leaves(EXAMPLE_1_REFERENCE), [(0, 2), (1, 1)], [1.0, 0.0], group=[0, 0])

    loss = build_objective("reval", {"beta": 0.5})(tokens, {})

    assert loss.watched["bellman_residual"].tolist() == pytest.approx([-1.610030, 0.776723], abs=2e-6)
    assert loss.total.item() == pytest.approx(1.597747, abs=2e-6)


def test_example_2_is_a_fixed_point() -> None:
    policy, reference = leaves({(): [2.2, 0.1, 0.0]}), leaves({(): [0.2, 0.1, 0.0]})
    tokens = trajectories(policy, reference, [(0,), (1,), (2,)], [1.0, 0.0, 0.0], group=[0, 1, 2])

    total = build_objective("reval", {"beta": 0.5, "centring": "none"})(tokens, {}).total

    assert total.item() == pytest.approx(0.0, abs=1e-10)
    assert policy[()].softmax(-1).tolist() == pytest.approx([0.810859, 0.099295, 0.089846], abs=1e-6)


REFERENCE_3 = {(): [0.3, -0.1], (0,): [0.2, 0.0], (1,): [-0.4, 0.1]}


def example_3(policy: Logits) -> Tokens:
    """Ten trajectories: aa, ab, ba, bb with weights 0.4, 0.3, 0.2, 0.1."""
    responses = [(0, 0)] * 4 + [(0, 1)] * 3 + [(1, 0)] * 2 + [(1, 1)]
    rewards = [1.0] * 4 + [0.0] * 5 + [1.0]
    return trajectories(policy, leaves(REFERENCE_3), responses, rewards, group=list(range(10)))


def test_example_3_gradient_at_the_reference() -> None:
    policy = leaves(REFERENCE_3)

    total = build_objective("reval", {"beta": 0.5, "centring": "none"})(example_3(policy), {}).total

    assert total.item() == pytest.approx(2.0, abs=1e-6)
    assert gradient(total, policy[()]).tolist() == pytest.approx([-1.6, -0.4], abs=1e-6)
    assert gradient(total, policy[(0,)]).tolist() == pytest.approx([-0.720266, 0.720266], abs=1e-6)
    assert gradient(total, policy[(1,)]).tolist() == pytest.approx([0.151016, -0.151016], abs=1e-6)


def test_example_3_descends_to_the_soft_optimal_policy() -> None:
    policy = leaves(REFERENCE_3)
    objective = build_objective("reval", {"beta": 0.5, "centring": "none"})
    optimizer = torch.optim.SGD(policy.values(), lr=0.1)
    seen: dict[int, list[float]] = {}

    for step in range(1, 1001):
        optimizer.zero_grad()
        objective(example_3(policy), {}).total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        if step in (10, 100, 1000):
            root, after_a, after_b = (policy[state].softmax(-1).detach() for state in ((), (0,), (1,)))
            seen[step] = torch.cat([root[0] * after_a, root[1] * after_b]).tolist()

    assert seen[10] == pytest.approx([0.549223, 0.179652, 0.084668, 0.186456], abs=2e-5)
    assert seen[100] == pytest.approx([0.583136, 0.065170, 0.038923, 0.312771], abs=2e-5)
    assert seen[1000] == pytest.approx([0.517611, 0.057353, 0.032242, 0.392794], abs=2e-5)
