"""Accuracy on the held-out prompts of a task: pass@1 and pass@k of one version.

One actor evaluates one version out of each interval of them: it asks the service for the turn, keeps its weights until
it is done, and submits what it drew as eval groups, which are never trained on.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actor.engine import Engine, GenerationRequest
from actor.judge import Judge
from actor.rollout import fits
from actor.settings import ActorSettings, EvaluationSettings
from actor.tasks import Prompt, Task
from buffer.errors import Conflict, InvalidSettings
from buffer.evaluations import Evaluation, EvaluationClaim, Evaluations
from buffer.types import Group, PolicyVersion, SamplingSettings, Split

log = logging.getLogger(__name__)

UNTRUNCATED = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
"""The policy itself."""


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Return the unbiased estimate of P(one of k samples is solved) from `num_samples` of a prompt (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), as a product so that no binomial overflows.
    """
    if num_samples - num_solved < k:
        return 1.0
    failing = np.arange(num_samples - num_solved + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / failing))


def held_out_accuracy(engine: Engine, task: Task, settings: ActorSettings) -> float:
    """Return the mean reward of one response per held-out prompt, drawn at temperature 1."""
    prompts = task.held_out()
    completions = engine.generate(_requests(prompts, 1, UNTRUNCATED, settings))
    rewards = [
        task.reward(prompt, completion.response_ids) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return sum(rewards) / len(rewards)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates what its actor holds, when it is its turn. The actor's main loop owns it."""

    engine: Engine
    judge: Judge
    evaluations: Evaluations
    settings: ActorSettings
    actor_id: str
    solved_reward: float
    """Reward from which a response counts as solved (table.solved_reward)."""
    stop: threading.Event
    now: Callable[[], float] = time.monotonic
    unix_time: Callable[[], float] = time.time
    _asked_interval: int = field(default=-1, init=False)
    _ask_again_at_s: float = field(default=math.inf, init=False)

    def has_turn(self, version: PolicyVersion) -> bool:
        """Ask for the turn to evaluate a version; False without asking where the answer is known.

        Raises what tells that the service is away.
        """
        settings = self.settings.evaluation
        if settings.every_updates is None:
            return False
        interval = version // settings.every_updates
        if interval <= self._asked_interval and self.now() < self._ask_again_at_s:
            return False
        claim = EvaluationClaim(
            actor_id=self.actor_id, version=version, every_updates=settings.every_updates, lease_s=settings.lease_s
        )
        answer = self.evaluations.claim(claim)
        self._asked_interval = interval
        self._ask_again_at_s = math.inf if answer.ask_again_s is None else self.now() + answer.ask_again_s
        log.info("version %d: %s", version, answer.reason or "it is this actor's turn to evaluate it")
        return answer.granted

    def evaluate(self, version: PolicyVersion) -> list[Group]:
        """Draw, score and hand in the result; return what was drawn as eval groups, none when told to stop meanwhile.

        The caller keeps the engine at `version`. Raises what tells that the service is away: the result is lost then.
        """
        began_s = self.now()
        groups: list[Group] = []
        settings = self.settings.evaluation
        prompts = self._prompts()
        at_once = self.settings.groups_per_batch * self.settings.batches_in_flight
        for start in range(0, len(prompts), at_once):
            if self.stop.is_set():
                return []
            groups += self._draw(prompts[start : start + at_once])
        if self.stop.is_set() or not groups:  # the last ones may have been aborted
            return []
        evaluation = summary(
            groups,
            actor_id=self.actor_id,
            version=version,
            settings=settings,
            solved_reward=self.solved_reward,
            finished_s=self.unix_time(),
            seconds=self.now() - began_s,
        )
        try:
            self.evaluations.record(evaluation)
        except Conflict as error:
            log.warning("the evaluation of version %d is void: %s", version, error)
        return groups

    def _prompts(self) -> list[Prompt]:
        """Return the prompts, always the same ones. Raises InvalidSettings when the model can hold none of them."""
        held_out = self.judge.task.held_out()[: self.settings.evaluation.num_prompts]
        prompts = [prompt for prompt in held_out if fits(prompt, self.engine, self.settings)]
        told = f"of {len(held_out)} held-out prompts leave no room for max_new_tokens={self.settings.max_new_tokens}"
        if not prompts:
            raise InvalidSettings(
                f"{len(held_out)} {told}",
                hint="lower actor.max_new_tokens, or leave actor.evaluation.every_updates out",
            )
        if len(prompts) < len(held_out):
            log.warning("%d %s: they are left out of this evaluation", len(held_out) - len(prompts), told)
        return prompts

    def _draw(self, prompts: Sequence[Prompt]) -> list[Group]:
        settings = self.settings.evaluation
        requests = _requests(prompts, settings.samples_per_prompt, settings.sampling, self.settings)
        drawn = self.engine.generate(requests)
        return self.judge.groups(prompts, drawn, split=Split.EVAL, sampling=settings.sampling)


def summary(
    groups: Sequence[Group],
    *,
    actor_id: str,
    version: PolicyVersion,
    settings: EvaluationSettings,
    solved_reward: float,
    finished_s: float,
    seconds: float,
) -> Evaluation:
    """Return what the groups of an evaluation, one a prompt, say."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    versions = [span.version for trajectory in trajectories for span in trajectory.spans if span.version is not None]
    size = settings.samples_per_prompt
    solved = [sum(t.reward >= solved_reward for t in group.trajectories) for group in groups]
    ks = [1 << power for power in range(size.bit_length())]
    return Evaluation(
        actor_id=actor_id,
        version=version,
        oldest_version=min(versions),
        newest_version=max(versions),
        num_prompts=len(groups),
        samples_per_prompt=size,
        sampling=settings.sampling,
        pass_at={str(k): float(np.mean([pass_at_k(size, count, k) for count in solved])) for k in ks},
        pass_1_standard_error=float(np.std(np.array(solved) / size) / math.sqrt(len(groups))),
        reward_mean=float(np.mean([trajectory.reward for trajectory in trajectories])),
        response_tokens_mean=float(np.mean([len(trajectory.response_ids) for trajectory in trajectories])),
        finished_s=finished_s,
        seconds=seconds,
    )


def _requests(
    prompts: Sequence[Prompt], samples: int, sampling: SamplingSettings, settings: ActorSettings
) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt_ids=prompt.token_ids, sampling=sampling, max_new_tokens=settings.max_new_tokens)
        for prompt in prompts
        for _ in range(samples)
    ]
