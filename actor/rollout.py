"""One batch: prompts from the task, several groups generated side by side, rewards, records."""

import logging
import threading

import numpy as np

from actor.engine import Engine, GenerationRequest
from actor.judge import Judge
from actor.settings import ActorSettings
from actor.tasks import Prompt
from buffer.errors import InvalidSettings
from buffer.types import Group, Split

log = logging.getLogger(__name__)

MAX_DRAWS = 100
"""Prompts drawn for one that the model can hold: a task of which fewer fit is not the right one for it."""


class Rollouts:
    """Makes batches of whole groups. Several threads may ask for one at once, if the engine takes it."""

    def __init__(self, *, engine: Engine, judge: Judge, settings: ActorSettings, rng: np.random.Generator) -> None:
        self._engine = engine
        self._judge = judge
        self._settings = settings
        self._rng = rng
        self._drawing = threading.Lock()  # prompts come from one generator
        self.too_long_total = 0
        """Prompts that left no room for a response: others were drawn in their place."""

    def next_batch(self) -> list[Group]:
        """Generate `groups_per_batch` train groups, less those that the judge leaves out.

        Raises what the engine raises, TaskFailed, and InvalidSettings when hardly a prompt leaves room for a response.
        """
        settings = self._settings
        with self._drawing:
            prompts = [self._prompt() for _ in range(settings.groups_per_batch)]
        requests = [
            GenerationRequest(
                prompt_ids=prompt.token_ids, sampling=settings.sampling, max_new_tokens=settings.max_new_tokens
            )
            for prompt in prompts
            for _ in range(settings.group_size)
        ]
        drawn = self._engine.generate(requests)
        return self._judge.groups(prompts, drawn, split=Split.TRAIN, sampling=settings.sampling)

    def _prompt(self) -> Prompt:
        """Draw a prompt that leaves room for a response."""
        for _ in range(MAX_DRAWS):
            prompt = self._judge.task.sample(self._rng)
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
