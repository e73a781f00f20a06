from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from actor.engine import Completion, GenerationRequest
from actor.judge import Judge
from actor.rollout import Rollouts
from actor.settings import ActorSettings
from actor.tasks import Prompt, RunningSums
from actor.torch_engine import TorchEngine
from buffer.errors import InvalidSettings
from buffer.types import FinishReason
from tests.factories import RUN_ID


class Interrupted(TorchEngine):
    """An engine whose fifth response is aborted."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        drawn = super().generate(requests)
        return [*drawn[:4], replace(drawn[4], finish_reason=FinishReason.ABORT), *drawn[5:]]


def test_a_group_with_an_aborted_member_is_left_out(
    model_dir: Path, keyframes: list[Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = Interrupted(model_dir, seed=1)
    engine.load(keyframes[0], 0)
    settings = ActorSettings(group_size=2, groups_per_batch=4, max_new_tokens=8)
    task = RunningSums(tokenizer, num_digits=4)
    judge = Judge(task, run_id=RUN_ID, max_unscored_groups=1)
    rollouts = Rollouts(engine=engine, judge=judge, settings=settings, rng=np.random.default_rng(0))

    groups = rollouts.next_batch()

    assert len(groups) == 3
    assert all(t.finish_reason is not FinishReason.ABORT for group in groups for t in group.trajectories)


class OfManyLengths(RunningSums):
    """Prompts of the lengths that are named, in turn."""

    lengths: Sequence[int]
    draws = 0

    def sample(self, rng: np.random.Generator) -> Prompt:
        prompt = super().sample(rng)
        self.draws += 1
        return replace(prompt, token_ids=np.resize(prompt.token_ids, self.lengths[self.draws % len(self.lengths)]))


def test_a_prompt_that_the_model_cannot_hold_is_drawn_anew_and_counted(
    engine: TorchEngine, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ActorSettings(group_size=2, groups_per_batch=4, max_new_tokens=8)
    task = OfManyLengths(tokenizer, num_digits=4)
    task.lengths = (5, 121, 120)  # and 8 tokens of response, of 128
    judge = Judge(task, run_id=RUN_ID, max_unscored_groups=1)
    rollouts = Rollouts(engine=engine, judge=judge, settings=settings, rng=np.random.default_rng(0))

    groups = rollouts.next_batch()

    assert [len(group.trajectories[0].prompt_ids) for group in groups] == [120, 5, 120, 5]
    assert rollouts.too_long_total == 2
    assert "has 121 tokens and leaves no room for max_new_tokens=8: another is drawn (2 so far)" in caplog.text

    task.lengths = (121,)
    with pytest.raises(InvalidSettings, match="none of 100 prompts leaves room for max_new_tokens=8 in the 128 tokens"):
        rollouts.next_batch()
