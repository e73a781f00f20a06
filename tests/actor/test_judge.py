import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from transformers import PreTrainedTokenizerFast

from actor.judge import TaskFailed
from actor.tasks import Prompt, RunningSums
from tests.actor.publishing import publish, wait_until
from tests.actor.test_loop import SETTINGS, Actor, stored


class Unsure(RunningSums):
    """A task whose judge answers late, or with NaN, as it is told."""

    failures: list[str]

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        match self.failures.pop() if self.failures else "":
            case "late":
                raise TimeoutError("the judge did not answer")
            case "nan":
                return math.nan
        return super().reward(prompt, response_ids)


def test_a_group_without_a_reward_is_dropped_and_counted_and_too_many_in_a_row_end_the_actor(
    tmp_path: Path,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    keyframes: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    actor = Actor(tmp_path, model_dir, tokenizer, task_class=Unsure)
    assert isinstance(actor.task, Unsure)
    actor.task.failures = ["late", "nan"]
    publish(actor.store, model_dir, keyframes[0], 0)

    def run_to_its_end(task: Unsure) -> None:
        with actor.running():
            wait_until(lambda: actor.inbox.inserted >= 4)
            assert actor.judge.unscored_total == 2
            task.failures = ["late"] * 3
            wait_until(lambda: actor.ended_with is not None)

    with pytest.raises(
        TaskFailed, match=r"^3 groups in a row could not be scored: .* raised TimeoutError at test_judge"
    ):
        run_to_its_end(actor.task)

    assert "2 so far: its reward raised TimeoutError at test_judge.py:" in caplog.text
    assert "1 so far: its reward is nan, not a finite number" in caplog.text
    assert actor.judge.unscored_total == 5
    assert all(len(group.trajectories) == SETTINGS.group_size for group in stored(actor))
