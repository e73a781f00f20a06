import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import numpy.typing as npt
import pytest
from transformers import PreTrainedTokenizerFast

from actor.engine import Completion, GenerationRequest
from actor.evaluate import Evaluator, pass_at_k, summary
from actor.judge import Judge
from actor.settings import ActorSettings, EvaluationSettings
from actor.tasks import Prompt, RunningSums
from actor.torch_engine import TorchEngine
from buffer.errors import InvalidSettings
from buffer.types import Split
from buffer.weights.directory_store import DirectoryWeightStore
from services.evaluations import BoardEvaluations
from services.presence import MemoryBoard
from tests.actor.publishing import publish
from tests.actor.test_rollout import Interrupted
from tests.factories import RUN_ID, make_group


@pytest.mark.parametrize(("num_samples", "num_solved"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_samples_that_hold_a_solved_one(
    num_samples: int, num_solved: int
) -> None:
    samples = [index < num_solved for index in range(num_samples)]
    for k in range(1, num_samples + 1):
        assert pass_at_k(num_samples, num_solved, k) == pytest.approx(mean(map(any, combinations(samples, k))))


def test_pass_at_k_does_not_overflow() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_a_summary_is_over_prompts_and_says_which_versions_drew_it() -> None:
    groups = [
        make_group("a", split=Split.EVAL, version=3, rewards=(1.0, 0.0, 0.9, 0.0)),
        make_group("b", split=Split.EVAL, version=4, rewards=(0.0, 0.0, 0.0, 0.0)),
        make_group("c", split=Split.EVAL, version=4, rewards=(1.0, 1.0, 1.0, 0.9)),
    ]

    evaluation = summary(
        groups,
        actor_id="a",
        version=4,
        settings=EvaluationSettings(every_updates=1, samples_per_prompt=4),
        solved_reward=0.95,
        finished_s=1.0,
        seconds=2.0,
    )

    # solved of 4: 1, 0, 3
    assert evaluation.pass_at == pytest.approx({"1": 4 / 12, "2": (1 / 2 + 0 + 1) / 3, "4": 2 / 3})
    assert evaluation.pass_1_standard_error == pytest.approx(
        (((1 / 12) ** 2 + (4 / 12) ** 2 + (5 / 12) ** 2) / 9) ** 0.5
    )
    assert evaluation.reward_mean == pytest.approx((1.9 + 0 + 3.9) / 12)
    assert (evaluation.num_prompts, evaluation.samples_per_prompt) == (3, 4)
    assert (evaluation.oldest_version, evaluation.newest_version) == (3, 4)


@pytest.fixture
def store(tmp_path: Path, model_dir: Path, keyframes: list[Path]) -> DirectoryWeightStore:
    """Version 0 is published."""
    store = DirectoryWeightStore(tmp_path)
    publish(store, model_dir, keyframes[0], 0)
    return store


class FirstOnesLong(RunningSums):
    """The first held-out prompts are longer than the model."""

    num_long = 2

    def held_out(self) -> list[Prompt]:
        prompts = super().held_out()
        long = [replace(prompt, token_ids=np.resize(prompt.token_ids, 121)) for prompt in prompts[: self.num_long]]
        return [*long, *prompts[self.num_long :]]


def _evaluator(engine: TorchEngine, task: RunningSums, store: DirectoryWeightStore, **settings: int) -> Evaluator:
    evaluation = EvaluationSettings(every_updates=1, num_prompts=5, samples_per_prompt=2)
    evaluator = Evaluator(
        engine=engine,
        judge=Judge(task, run_id=RUN_ID, max_unscored_groups=3),
        evaluations=BoardEvaluations(MemoryBoard(), store),
        settings=ActorSettings(max_new_tokens=8, evaluation=evaluation, **settings),
        actor_id="a",
        solved_reward=1.0,
        stop=threading.Event(),
    )
    assert evaluator.has_turn(0)
    return evaluator


def test_held_out_prompts_that_the_model_cannot_hold_are_left_out_and_said(
    engine: TorchEngine,
    tokenizer: PreTrainedTokenizerFast,
    store: DirectoryWeightStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = FirstOnesLong(tokenizer, num_digits=4)
    evaluator = _evaluator(engine, task, store)

    groups = evaluator.evaluate(0)

    assert [group.prompt_id for group in groups] == [prompt.prompt_id for prompt in task.held_out()[2:5]]
    assert [result.num_prompts for result in evaluator.evaluations.read().results] == [3]
    assert "2 of 5 held-out prompts leave no room for max_new_tokens=8" in caplog.text

    task.num_long = 5
    with pytest.raises(InvalidSettings, match="5 of 5 held-out prompts leave no room"):
        evaluator.evaluate(0)


def test_a_prompt_with_an_aborted_response_is_left_out_of_an_evaluation(
    model_dir: Path, keyframes: list[Path], tokenizer: PreTrainedTokenizerFast, store: DirectoryWeightStore
) -> None:
    engine = Interrupted(model_dir, seed=1)  # at the fifth response, which is of the third prompt
    engine.load(keyframes[0], 0)
    task = RunningSums(tokenizer, num_digits=4)

    groups = _evaluator(engine, task, store).evaluate(0)

    wanted = [task.held_out()[index].prompt_id for index in (0, 1, 3, 4)]
    assert [group.prompt_id for group in groups] == wanted


class NoVerdict(RunningSums):
    """A judge that fails on the fourth response, which is of the second prompt."""

    judged = 0

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        self.judged += 1
        if self.judged == 4:
            raise TimeoutError("the judge did not answer")
        return super().reward(prompt, response_ids)


def test_a_prompt_that_cannot_be_scored_is_left_out_of_an_evaluation_which_says_how_many_it_has(
    engine: TorchEngine, tokenizer: PreTrainedTokenizerFast, store: DirectoryWeightStore
) -> None:
    evaluator = _evaluator(engine, NoVerdict(tokenizer, num_digits=4), store)

    groups = evaluator.evaluate(0)

    assert len(groups) == 4
    assert [result.num_prompts for result in evaluator.evaluations.read().results] == [4]


def test_an_evaluation_draws_as_many_groups_at_once_as_all_batches_in_flight_have(
    model_dir: Path, keyframes: list[Path], tokenizer: PreTrainedTokenizerFast, store: DirectoryWeightStore
) -> None:
    sizes: list[int] = []

    class Counting(TorchEngine):
        """Notes how many responses it was asked for at once."""

        def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
            sizes.append(len(requests))
            return super().generate(requests)

    engine = Counting(model_dir, seed=1)
    engine.load(keyframes[0], 0)
    task = RunningSums(tokenizer, num_digits=4)

    _evaluator(engine, task, store, groups_per_batch=1, batches_in_flight=4).evaluate(0)

    assert sizes == [8, 2]
