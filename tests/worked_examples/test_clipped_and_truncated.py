"""verl's bypass losses on its own example (executed by its authors' code), and GRPO on the same numbers."""

import pytest

from learner.objectives.recipes import build_objective
from learner.tokens import Tokens
from tests.learner.objectives.batches import gradient, one_batch

UNUSED = 0.5


def example() -> Tokens:
    return one_batch(
        policy=[[0.7, 0.38, 0.82], [0.2, 0.9, UNUSED]],
        behavior=[[0.5, 0.4, 0.8], [0.3, 0.2, UNUSED]],
        rewards=[1.0, -0.5],
        mask=[[1, 1, 1], [1, 1, 0]],
    )


@pytest.mark.parametrize(
    ("name", "options", "loss", "gradients"),
    [
        ("dapo", {}, -0.121, [[0.0, -0.19, -0.205], [0.0, 0.45, 0.0]]),
        ("dapo", {"dual_clip": 3.0}, -0.271, [[0.0, -0.19, -0.205], [0.0, 0.0, 0.0]]),
        ("reinforce", {}, 0.133062, [[-0.2, -0.2, -0.2], [0.1, 0.1, 0.0]]),
        ("tis", {"cap": 2.0}, 0.196024, [[-0.28, -0.19, -0.205], [0.066667, 0.2, 0.0]]),
    ],
)
def test_loss_and_gradient(name: str, options: dict[str, object], loss: float, gradients: list[list[float]]) -> None:
    tokens = example()

    total = build_objective(name, {"advantage": "none", **options})(tokens, {}).total

    assert total.item() == pytest.approx(loss, abs=1e-6)
    assert gradient(total, tokens.logprobs).tolist() == [pytest.approx(row, abs=1e-6) for row in gradients]


def test_grpo_weighs_sequences_the_same() -> None:
    tokens = example()

    total = build_objective("grpo", {"advantage": "none", "clip_high": 0.28})(tokens, {}).total

    # tokens 1.28, 0.95, 1.025 and -0.4, -2.25: half the mean of the first row plus half that of the second
    assert -total.item() == pytest.approx((3.255 / 3 - 2.65 / 2) / 2, abs=1e-6)
    assert (-gradient(total, tokens.logprobs)).tolist() == [
        pytest.approx([0.0, 0.95 / 6, 1.025 / 6], abs=1e-6),
        pytest.approx([0.0, -2.25 / 4, 0.0], abs=1e-6),
    ]
