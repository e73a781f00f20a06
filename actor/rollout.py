"""One batch: prompts from the task, several groups generated side by side, rewards, records."""

import uuid
from collections.abc import Sequence

import numpy as np

from actor.engine import Completion, Engine, GenerationRequest
from actor.settings import ActorSettings
from actor.tasks import Prompt, Task
from buffer.types import FinishReason, Group, SamplingSettings, Split, Trajectory


class Rollouts:
    """Makes batches of whole groups. Not thread-safe: the actor's main loop owns it."""

    def __init__(
        self, *, engine: Engine, task: Task, settings: ActorSettings, run_id: str, rng: np.random.Generator
    ) -> None:
        self._engine = engine
        self._task = task
        self._settings = settings
        self._run_id = run_id
        self._rng = rng

    def next_batch(self) -> list[Group]:
        """Generate `groups_per_batch` train groups; raises what the engine raises.

        A group with an aborted member is left out: the rewards of the others would be compared with too few.
        """
        settings = self._settings
        prompts = [self._task.sample(self._rng) for _ in range(settings.groups_per_batch)]
        requests = [
            GenerationRequest(
                prompt_ids=prompt.token_ids, sampling=settings.sampling, max_new_tokens=settings.max_new_tokens
            )
            for prompt in prompts
            for _ in range(settings.group_size)
        ]
        completions = self._engine.generate(requests)
        size = settings.group_size
        members = [completions[index * size : (index + 1) * size] for index in range(len(prompts))]
        return [
            as_group(self._task, prompt, drawn, run_id=self._run_id, split=Split.TRAIN, sampling=settings.sampling)
            for prompt, drawn in zip(prompts, members, strict=True)
            if all(completion.finish_reason is not FinishReason.ABORT for completion in drawn)
        ]


def as_group(
    task: Task,
    prompt: Prompt,
    completions: Sequence[Completion],
    *,
    run_id: str,
    split: Split,
    sampling: SamplingSettings,
) -> Group:
    """Score the completions of one prompt and return them as a group with an id of its own."""
    # not from the seeded generator: an actor that starts again must never reuse an id
    group_id = uuid.uuid4().hex
    return Group(
        run_id=run_id,
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
                reward=task.reward(prompt, completion.response_ids),
                finish_reason=completion.finish_reason,
                kept_token_ids=completion.kept_token_ids,
                kept_token_counts=completion.kept_token_counts,
                distribution_logprobs=completion.distribution_logprobs,
            )
            for index, completion in enumerate(completions)
        ),
    )
