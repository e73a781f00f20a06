"""One batch: prompts from the task, several groups generated side by side, rewards, records."""

import logging
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from actor.engine import Completion, Engine, GenerationRequest
from actor.settings import ActorSettings
from actor.tasks import Prompt, Task
from buffer.errors import InvalidSettings
from buffer.types import FinishReason, Group, SamplingSettings, Split, Trajectory

log = logging.getLogger(__name__)

MAX_DRAWS = 100
"""Prompts drawn for one that the model can hold: a task of which fewer fit is not the right one for it."""


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
        self.too_long_total = 0
        """Prompts that left no room for a response: others were drawn in their place."""

    def next_batch(self) -> list[Group]:
        """Generate `groups_per_batch` train groups; raises what the engine raises.

        A group with an aborted member is left out: the rewards of the others would be compared with too few.
        Raises InvalidSettings when hardly a prompt leaves room for a response.
        """
        settings = self._settings
        prompts = [self._prompt() for _ in range(settings.groups_per_batch)]
        requests = [
            GenerationRequest(
                prompt_ids=prompt.token_ids, sampling=settings.sampling, max_new_tokens=settings.max_new_tokens
            )
            for prompt in prompts
            for _ in range(settings.group_size)
        ]
        return [
            as_group(self._task, prompt, drawn, run_id=self._run_id, split=Split.TRAIN, sampling=settings.sampling)
            for prompt, drawn in whole_groups(prompts, self._engine.generate(requests))
        ]

    def _prompt(self) -> Prompt:
        """Draw a prompt that leaves room for a response."""
        for _ in range(MAX_DRAWS):
            prompt = self._task.sample(self._rng)
            if fits(prompt, self._engine, self._settings):
                return prompt
            self._note_too_long(prompt)
        raise InvalidSettings(
            f"none of {MAX_DRAWS} prompts leaves room for max_new_tokens={self._settings.max_new_tokens} in the"
            f" {self._engine.max_tokens} tokens of the model",
            hint="lower actor.max_new_tokens, or choose task options with shorter questions",
        )

    def _note_too_long(self, prompt: Prompt) -> None:
        self.too_long_total += 1
        if self.too_long_total.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: a task may have many
            log.warning(
                "prompt %s has %d tokens and leaves no room for max_new_tokens=%d: another is drawn (%d so far)",
                prompt.prompt_id,
                len(prompt.token_ids),
                self._settings.max_new_tokens,
                self.too_long_total,
            )


def fits(prompt: Prompt, engine: Engine, settings: ActorSettings) -> bool:
    """Whether the model can hold the prompt and the longest response to it."""
    return len(prompt.token_ids) + settings.max_new_tokens <= engine.max_tokens


def whole_groups(
    prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Iterator[tuple[Prompt, Sequence[Completion]]]:
    """Yield the prompts with the completions of each, but those of which one was aborted."""
    size = len(completions) // len(prompts)
    for index, prompt in enumerate(prompts):
        drawn = completions[index * size : (index + 1) * size]
        if all(completion.finish_reason is not FinishReason.ABORT for completion in drawn):
            yield prompt, drawn


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
