"""Accuracy on the held-out prompts of a task."""

from actor.engine import Engine, GenerationRequest
from actor.settings import ActorSettings
from actor.tasks import Task
from buffer.types import SamplingSettings

UNTRUNCATED = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
"""The policy itself."""


def held_out_accuracy(engine: Engine, task: Task, settings: ActorSettings) -> float:
    """Return the mean reward of one response per held-out prompt, drawn at temperature 1."""
    prompts = task.held_out()
    completions = engine.generate(
        [
            GenerationRequest(prompt_ids=prompt.token_ids, sampling=UNTRUNCATED, max_new_tokens=settings.max_new_tokens)
            for prompt in prompts
        ]
    )
    rewards = [
        task.reward(prompt, completion.response_ids) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return sum(rewards) / len(rewards)
