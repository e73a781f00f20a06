"""Batches that must not move the weights: which, what stays as it was, how they are counted, when the run ends."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from learner.collate import collate
from learner.errors import GradientSpike, TooManySkips
from learner.objectives.objective import Loss
from learner.step import Progress, Trainer
from learner.tokens import Column, NonFiniteTokens, Tokens
from tests.factories import make_group, make_trajectory
from tests.learner.builders import make_trainer, plain_samples
from tests.learner.test_loop import LoopRig, loop_settings


class _Scaled:
    """-scale * mean log-prob, with a multiplier that counts."""

    name = "scaled"
    denominator = "all tokens"
    columns = frozenset[Column]()
    reads_token_rewards = False
    scale = 1.0

    def __call__(self, tokens: Tokens, multipliers: Mapping[str, float]) -> Loss:
        total = -self.scale * tokens.logprobs.sum() / tokens.num_tokens
        return Loss(total=total, parts={"all": total.detach()}, gates={})

    def initial_multipliers(self) -> dict[str, float]:
        return {"count": 0.0}

    def next_multipliers(self, tokens: Tokens, multipliers: Mapping[str, float]) -> dict[str, float]:
        return {"count": multipliers["count"] + 1}


def _state(trainer: Trainer) -> tuple[object, ...]:
    moments = [
        value.clone()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    weights = [weight.clone() for weight in trainer.policy.weights().values()]
    return weights, moments, trainer.progress, dict(trainer.multipliers), trainer.trackers()


def _equal(before: tuple[object, ...], after: tuple[object, ...]) -> bool:
    def same(left: object, right: object) -> bool:
        if isinstance(left, list) and left and isinstance(left[0], torch.Tensor):
            assert isinstance(right, list)
            return len(left) == len(right) and all(a.equal(b) for a, b in zip(left, right, strict=True))
        return left == right

    return all(same(left, right) for left, right in zip(before, after, strict=True))


def test_a_gradient_far_longer_than_usual_moves_nothing(model_dir: Path) -> None:
    objective = _Scaled()
    trainer = make_trainer(model_dir, objective=objective, lr=1e-4)
    batch = collate(plain_samples(0), clock=0)
    for _ in range(16):
        trainer.update(batch)
    before = _state(trainer)

    objective.scale = 100.0
    with pytest.raises(GradientSpike, match=r"the gradient norm is .*, 1\d\d times the usual"):
        trainer.update(batch)

    assert _equal(before, _state(trainer))
    objective.scale = 2.0
    trainer.update(batch)
    assert trainer.progress == Progress(17, 17)


def test_the_first_gradients_of_a_run_and_silent_ones_set_no_standard(model_dir: Path) -> None:
    objective = _Scaled()
    trainer = make_trainer(model_dir, objective=objective, lr=1e-4)
    batch = collate(plain_samples(0), clock=0)
    for scale in (1e-3, *[0.0] * 20, 1.0):
        objective.scale = scale
        trainer.update(batch)


@pytest.mark.parametrize("objective", ["grpo", "stalewise"])
def test_data_that_is_not_finite_moves_nothing(model_dir: Path, objective: str) -> None:
    trainer = make_trainer(model_dir, objective=objective)
    trainer.update(collate(plain_samples(1), clock=0))
    before = _state(trainer)
    batch = collate(plain_samples(0), clock=1)
    batch.behavior_logprobs[0, 0] = math.nan

    with pytest.raises(NonFiniteTokens):
        trainer.update(batch)

    assert _equal(before, _state(trainer))


class _Sometimes(_Scaled):
    """Not finite at the updates that were named."""

    def __init__(self, bad_calls: set[int]) -> None:
        self._bad_calls = bad_calls
        self._calls = 0

    def __call__(self, tokens: Tokens, multipliers: Mapping[str, float]) -> Loss:
        self.scale = math.inf if self._calls in self._bad_calls else 1.0
        self._calls += 1
        return super().__call__(tokens, multipliers)


def test_a_bad_batch_is_skipped_counted_and_said_and_costs_no_version(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=4))
    rig.trainer = make_trainer(model_dir, objective=_Sometimes({1, 2, 4}))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    rig.loop().run()

    assert sorted(rig.store.manifests) == [0, 1, 2, 3, 4]
    skipped = [metrics.get("skipped/non_finite_gradient_updates_total", 0) for _, metrics in rig.reporter.updates]
    assert skipped == [0, 2, 3, 3]
    assert caplog.text.count("update 1 is skipped: update 1: the gradient of") == 2


def test_a_loss_that_is_not_finite_is_skipped_and_counted_before_anything_was_trained(
    model_dir: Path, tmp_path: Path
) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(max_skipped_updates=2))
    rig.trainer = make_trainer(model_dir, objective="reval")
    rig.table.advance_version(0)
    huge = [make_trajectory(name, reward=reward) for name, reward in (("usual", 0.0), ("huge", 1e18))]
    rig.insert(*(make_group(name, trajectories=huge) for name in "ab"))  # allowed, but its square is no float32

    with pytest.raises(TooManySkips, match=r"the last one because the loss of reval is not finite \(bellman inf\)"):
        rig.loop().run()

    assert rig.reporter.updates == []
    assert rig.reporter.counts == {"skipped/non_finite_loss_updates_total": 2}


class _Growing(_Scaled):
    """A thousand times as steep at one call as at all others."""

    def __init__(self, steep_call: int) -> None:
        self._steep_call = steep_call
        self._calls = 0

    def __call__(self, tokens: Tokens, multipliers: Mapping[str, float]) -> Loss:
        self.scale = 1000.0 if self._calls == self._steep_call else 1.0
        self._calls += 1
        return super().__call__(tokens, multipliers)


def test_a_gradient_spike_is_skipped_and_counted_and_the_run_goes_on(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=18, checkpoint_every=100))
    rig.trainer = make_trainer(model_dir, objective=_Growing(16), lr=1e-4)
    rig.table.advance_version(0)
    rig.insert(*(make_group(f"g{number}") for number in range(20)))

    rig.loop().run()

    assert rig.trainer.progress == Progress(18, 18)
    counted = [metrics.get("skipped/gradient_spike_updates_total", 0) for _, metrics in rig.reporter.updates]
    assert counted == [0] * 16 + [1, 1]


def test_too_many_bad_batches_in_a_row_stop_the_run_with_a_sentence(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=9, max_skipped_updates=3))
    rig.trainer = make_trainer(model_dir, objective=_Sometimes({0, 1, 3, 4, 5}))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    with pytest.raises(TooManySkips, match="3 updates in a row were skipped, the last one because update 1: the grad"):
        rig.loop().run()

    assert rig.trainer.progress == Progress(1, 1)
    assert rig.reporter.counts == {"skipped/non_finite_gradient_updates_total": 5}  # also those after the last update
    assert rig.checkpoints.newest() == tmp_path / "update-00000001"  # the weights are good
