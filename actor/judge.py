"""Drawn responses become groups: rewards from a task that may fail, and one record for each prompt."""

import logging
import threading
import traceback
import uuid
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from actor.engine import Completion
from actor.tasks import Prompt, Task
from buffer.errors import StalewiseError
from buffer.types import MAX_REWARD, FinishReason, Group, SamplingSettings, Split, Trajectory

log = logging.getLogger(__name__)


class TaskFailed(StalewiseError):
    """The rewards of many groups in a row could not be had."""


class _NoReward(Exception):
    """What happened in place of a reward."""


class Judge:
    """Scores whole groups; one that cannot be scored is dropped, counted and logged. Any thread may call it."""

    def __init__(self, task: Task, *, run_id: str, max_unscored_groups: int) -> None:
        self.task = task
        self._run_id = run_id
        self._max_unscored_groups = max_unscored_groups
        self._lock = threading.Lock()
        self._unscored_in_a_row = 0
        self.unscored_total = 0
        """Groups that were dropped because the reward of a response could not be had."""

    def groups(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        split: Split,
        sampling: SamplingSettings,
    ) -> list[Group]:
        """Return the groups of the prompts, with equally many completions of each in their order.

        A group with an aborted member is left out: the rewards of the others would be compared with too few.
        So is one that cannot be scored; raises TaskFailed after `max_unscored_groups` of those in a row.
        """
        size = len(completions) // len(prompts)
        groups = []
        for index, prompt in enumerate(prompts):
            drawn = completions[index * size : (index + 1) * size]
            if any(completion.finish_reason is FinishReason.ABORT for completion in drawn):
                continue
            try:
                rewards = [self._reward(prompt, completion.response_ids) for completion in drawn]
            except _NoReward as error:
                self._note_unscored(prompt, error)
                continue
            with self._lock:
                self._unscored_in_a_row = 0
            groups.append(self._group(prompt, drawn, rewards, split=split, sampling=sampling))
        return groups

    def _reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        try:
            given = self.task.reward(prompt, response_ids)
            reward = float(given)
        except Exception as error:  # the actor would die with its batch of one answer that a judge gave too late
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise _NoReward(
                f"raised {type(error).__name__} at {PurePath(place.filename).name}:{place.lineno}: {error}"
            ) from error
        if not abs(reward) <= MAX_REWARD:  # NaN and the infinities fail, too
            raise _NoReward(f"is {given!r}, not a finite number of at most {MAX_REWARD:g} in size")
        return reward

    def _note_unscored(self, prompt: Prompt, error: _NoReward) -> None:
        with self._lock:
            self.unscored_total += 1
            self._unscored_in_a_row += 1
            in_a_row = self._unscored_in_a_row
        log.warning(
            "dropped a group of prompt %s, %d so far: its reward %s", prompt.prompt_id, self.unscored_total, error
        )
        if in_a_row >= self._max_unscored_groups:
            raise TaskFailed(
                f"{in_a_row} groups in a row could not be scored: the reward of prompt {prompt.prompt_id} {error}",
                hint="mend the task, or raise actor.task.max_unscored_groups if its judge is away for a while",
            ) from error

    def _group(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        rewards: Sequence[float],
        *,
        split: Split,
        sampling: SamplingSettings,
    ) -> Group:
        # not from the seeded generator: an actor that starts again must never reuse an id
        group_id = uuid.uuid4().hex
        return Group(
            run_id=self._run_id,
            group_id=group_id,
            prompt_id=prompt.prompt_id,
            split=split,
            trajectories=tuple(
                Trajectory(
                    trajectory_id=f"{group_id}.{index}",
                    prompt_ids=prompt.token_ids,
                    response_ids=completion.response_ids,
                    response_mask=np.ones(len(completion.response_ids), np.bool_),
                    behavior_logprobs=completion.behavior_logprobs,
                    spans=completion.spans,
                    sampling=sampling,
                    reward=reward,
                    finish_reason=completion.finish_reason,
                    kept_token_ids=completion.kept_token_ids,
                    kept_token_counts=completion.kept_token_counts,
                    distribution_logprobs=completion.distribution_logprobs,
                )
                for index, (completion, reward) in enumerate(zip(completions, rewards, strict=True))
            ),
        )
