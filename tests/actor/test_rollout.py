from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from actor.engine import Completion, GenerationRequest
from actor.rollout import Rollouts
from actor.settings import ActorSettings
from actor.tasks import RunningSums
from actor.torch_engine import TorchEngine
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
    rollouts = Rollouts(engine=engine, task=task, settings=settings, run_id=RUN_ID, rng=np.random.default_rng(0))

    groups = rollouts.next_batch()

    assert len(groups) == 3
    assert all(t.finish_reason is not FinishReason.ABORT for group in groups for t in group.trajectories)
