"""What the learner says once, because nothing else would show it."""

from pathlib import Path

import pytest

from learner.objectives.recipes import build_objective
from tests.factories import make_group, make_trajectory
from tests.learner.builders import make_trainer
from tests.learner.test_loop import LoopRig, loop_settings


@pytest.mark.parametrize(("advantage", "warnings"), [("standardised", 1), ("optimal_token_baseline", 0)])
def test_token_rewards_that_the_objective_does_not_read_are_said_once(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, advantage: str, warnings: int
) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())
    rig.trainer = make_trainer(model_dir, objective=build_objective("grpo", {"advantage": advantage}))
    rig.table.advance_version(0)
    rewarded = [make_trajectory(name, token_rewards=[0.5, 0.0, 0.0, 0.0]) for name in ("t0", "t1")]
    rig.insert(make_group("a"), make_group("b", trajectories=rewarded))

    rig.loop().run()

    assert rig.trainer.progress.updates == 4
    assert caplog.text.count("token_rewards, which objective grpo does not read") == warnings


@pytest.mark.parametrize(
    ("selector", "warnings"),
    [
        ({"selector": {"kind": "weighted", "by": "priority"}}, 1),
        (
            {
                "replay_updates": 1,
                "replay_selector": {"kind": "mix", "fresh": 0.5, "rest": {"kind": "weighted", "by": "priority"}},
            },
            1,
        ),
        ({"replay_selector": {"kind": "weighted", "by": "priority"}}, 0),
    ],
    ids=["drawn by", "replayed by", "never drawn by"],
)
def test_a_learner_that_draws_by_priorities_says_that_it_posts_none(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, selector: dict[str, object], warnings: int
) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(**selector))
    rig.stop.set()

    rig.loop().run()

    assert caplog.text.count("drawn by priorities, which this learner does not post") == warnings
