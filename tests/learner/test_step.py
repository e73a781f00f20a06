import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from buffer.errors import InvalidSettings
from learner.collate import collate
from learner.errors import NonFiniteGradient, TrustRegionClosed
from learner.objectives.objective import Loss
from learner.optimizer import learning_rate
from learner.settings import OptimizerSettings
from learner.step import Progress
from learner.tokens import Column, Tokens
from tests.factories import make_group, make_trajectory
from tests.learner.builders import as_sample, make_trainer, mixed_samples, plain_samples


@dataclass(frozen=True)
class _Scaled:
    """-scale * sum of log-probs, with a gate that is open or closed for all tokens."""

    scale: float = 1.0
    gate_open: bool = True
    name: str = "scaled"
    denominator: str = "nothing"
    columns: frozenset[Column] = frozenset()
    reads_token_rewards: bool = False

    def __call__(self, tokens: Tokens, multipliers: Mapping[str, float]) -> Loss:
        total = -self.scale * tokens.logprobs.sum()
        return Loss(
            total=total, parts={"all": total.detach()}, gates={"door": torch.full_like(tokens.mask, self.gate_open)}
        )

    def initial_multipliers(self) -> dict[str, float]:
        return {"count": 0.0}

    def next_multipliers(self, tokens: Tokens, multipliers: Mapping[str, float]) -> dict[str, float]:
        assert not tokens.logprobs.requires_grad
        return {"count": multipliers["count"] + 1}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    settings = OptimizerSettings.model_validate({"lr": 1.0, "warmup_updates": 2, "schedule": schedule})

    rates = [learning_rate(settings, updates_done=done, total_updates=6) for done in range(6)]

    assert rates == pytest.approx(expected)


def test_an_update_advances_clock_and_updates_and_hands_the_multipliers_on(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, objective=_Scaled())
    trainer.progress = Progress(updates=3, clock=7)

    metrics = trainer.update(collate(plain_samples(0), clock=7))

    assert trainer.progress == Progress(updates=4, clock=8)
    assert metrics["multiplier/count"] == 0
    assert trainer.multipliers == {"count": 1}
    assert metrics["loss/all"] == metrics["loss/total"] > 0
    assert metrics["optimizer/lr"] == pytest.approx(1e-2)  # the last of 4 warm-up updates


def test_the_gradient_is_clipped_and_its_norm_reported_before(model_dir: Path) -> None:
    small, large = (make_trainer(model_dir, objective=_Scaled(scale=scale)) for scale in (1.0, 8.0))
    norms = [trainer.update(collate(plain_samples(0), clock=0))["gradient/norm"] for trainer in (small, large)]

    left = sum(
        parameter.grad.square().sum().item()
        for parameter in large.policy.model.parameters()
        if parameter.grad is not None
    )

    assert norms[1] == pytest.approx(8 * norms[0], rel=1e-4)
    assert math.sqrt(left) == pytest.approx(1.0, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_named_and_moves_nothing(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, objective=_Scaled(scale=math.inf))
    before = {name: weight.clone() for name, weight in trainer.policy.weights().items()}

    with pytest.raises(NonFiniteGradient, match=r"update 0: the gradient of \d+ parameters is not finite, first model"):
        trainer.update(collate(plain_samples(0), clock=0))

    assert all(weight.equal(before[name]) for name, weight in trainer.policy.weights().items())
    assert trainer.progress == Progress()
    assert trainer.multipliers == {"count": 0}


def test_of_a_gradient_that_is_not_finite_the_parameter_at_fault_alone_is_named(model_dir: Path) -> None:
    trainer = make_trainer(model_dir)
    trainer.policy.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(NonFiniteGradient, match=r"gradient of 1 parameters is not finite, first model\.norm\.weight "):
        trainer.update(collate(plain_samples(0), clock=0))


def test_with_one_step_a_batch_tis_ppo_is_tis(model_dir: Path) -> None:
    gradients = []
    for objective in ("tis", "tis_ppo"):
        trainer = make_trainer(model_dir, objective=objective)
        trainer.update(collate(mixed_samples(), clock=3))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None]))

    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_gate_that_stays_closed_stops_the_run_with_a_sentence(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, objective=_Scaled(gate_open=False), max_closed_updates=3)
    batch = collate(plain_samples(0), clock=0)
    trainer.update(batch)
    trainer.update(batch)

    with pytest.raises(TrustRegionClosed, match="gate door closed every token of the last 3 updates"):
        trainer.update(batch)


def test_an_open_gate_starts_the_count_again(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, objective=_Scaled(gate_open=False), max_closed_updates=2)
    batch = collate(plain_samples(0), clock=0)
    for gate_open in (False, True, False, True, False):
        trainer.objective = _Scaled(gate_open=gate_open)
        trainer.update(batch)

    assert trainer.progress.updates == 5


def test_a_reference_reset_without_a_reference_is_refused(model_dir: Path) -> None:
    with pytest.raises(InvalidSettings, match="reference_reset_every=5 but objective grpo uses no reference"):
        make_trainer(model_dir, objective="grpo", reference_reset_every=5)


def test_metrics_of_a_step_are_all_finite_numbers(model_dir: Path) -> None:
    metrics = make_trainer(model_dir, objective="stalewise").update(collate(mixed_samples(), clock=2))

    assert {
        "reward/mean",
        "age/updates_p50",
        "gradient/norm",
        "ratio/mean",
        "loss/total",
        "time/forward_s",
    } <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("objective", ["reinforce", "grpo", "reval", "stalewise"])
def test_the_rewarded_arm_of_a_bandit_becomes_likely(model_dir: Path, objective: str) -> None:
    """Four one-token answers to one prompt, one of them right, drawn once and used again and again."""
    arms = [11, 12, 13, 14]
    trainer = make_trainer(model_dir, objective=objective, lr=3e-2)
    trajectories = [
        make_trajectory(f"arm{arm}", prompt_ids=[5], response_ids=[arm], behavior_logprobs=[-3.0], reward=arm == 13)
        for arm in arms
    ]
    batch = collate([as_sample(make_group(trajectories=trajectories))], clock=0)
    before = trainer.policy.forward(batch, frozenset()).scores.logprobs[2, 0].exp().item()

    for _ in range(30):
        trainer.update(batch)

    after = trainer.policy.forward(batch, frozenset()).scores.logprobs[:, 0].exp().tolist()
    assert after[2] > max(2 * before, *after[:2], after[3])
