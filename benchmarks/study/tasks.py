"""Tasks of the study with a noisy teacher: a small model learns them in a minute, reinforcement learning mends it."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actor.end_tokens import eos_token_id
from actor.tasks import HELD_OUT_PROMPTS, HELD_OUT_SEED, Prompt, RunningSums, Task
from services.make_model import TaughtTask, make_tokenizer

TOKENIZER = make_tokenizer()


def _ids(text: str) -> npt.NDArray[np.int32]:
    return np.array(TOKENIZER.encode(text, add_special_tokens=False), np.int32)


class TextTask:
    """Question and answer as text of digits and signs; reward 1 only for the whole answer and the end token."""

    def __init__(self, name: str, draw: Callable[[np.random.Generator], str]) -> None:
        self._name, self._draw = name, draw
        rng = np.random.default_rng(HELD_OUT_SEED)
        questions: dict[str, None] = {}
        while len(questions) < HELD_OUT_PROMPTS:
            questions[draw(rng)] = None
        self._held_out = list(questions)
        self._is_held_out = frozenset(questions)

    def sample(self, rng: np.random.Generator) -> Prompt:
        """See Task."""
        while (question := self._draw(rng)) in self._is_held_out:
            pass
        return self._prompt(question)

    def held_out(self) -> list[Prompt]:
        """See Task."""
        return [self._prompt(question) for question in self._held_out]

    def _prompt(self, question: str) -> Prompt:
        return Prompt(
            prompt_id=f"{self._name}:{question.removesuffix('=')}",
            token_ids=_ids(question),
            answer_key={"text": question},
        )


class Sorting(TextTask):
    """16 digits and `=`; the answer is the digits in order.

    A teacher's slip writes a neighbour of the digit that is due.
    """

    NUM_DIGITS = 16

    def __init__(self) -> None:
        super().__init__("sorting", lambda rng: "".join(map(str, rng.integers(0, 10, self.NUM_DIGITS))) + "=")

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """See Task."""
        return float(np.array_equal(response_ids, _answer("".join(sorted(prompt.answer_key["text"][:-1])))))

    def noisy_answer(
        self, prompt: Prompt, rng: np.random.Generator, *, slip_probability: float
    ) -> npt.NDArray[np.int32]:
        """See TaughtTask."""
        digits = np.sort([int(character) for character in prompt.answer_key["text"][:-1]])
        slips = rng.choice([-1, 1], digits.size) * (rng.random(digits.size) < slip_probability)
        return _answer("".join(map(str, np.clip(digits + slips, 0, 9))))


class ScratchpadAddition(TextTask):
    """Two numbers of 12 digits, the lowest first, digit beside digit; the answer writes each column's digit and carry.

    29+94 is 2994= and is answered by 1141<eos>: 2+9 = 1 carry 1, 9+4+1 = 4 carry 1. Side by side, a column is always as
    far from its digits: a model of two layers does not find digits that are ever further away.
    """

    NUM_DIGITS = 12

    def __init__(self) -> None:
        super().__init__(
            "scratchpad_addition", lambda rng: "".join(map(str, rng.integers(0, 10, 2 * self.NUM_DIGITS))) + "="
        )

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """See Task."""
        return float(np.array_equal(response_ids, self._written(prompt, np.zeros(self.NUM_DIGITS, np.int64))))

    def noisy_answer(
        self, prompt: Prompt, rng: np.random.Generator, *, slip_probability: float
    ) -> npt.NDArray[np.int32]:
        """See TaughtTask. A slip adds 1 to 9 to a column's digit; the carry stays right."""
        slips = rng.integers(1, 10, self.NUM_DIGITS) * (rng.random(self.NUM_DIGITS) < slip_probability)
        return self._written(prompt, slips)

    def _written(self, prompt: Prompt, slips: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        digits = [int(character) for character in prompt.answer_key["text"][:-1]]
        carry, written = 0, ""
        for a, b, slip in zip(digits[::2], digits[1::2], slips, strict=True):
            column = a + b + carry
            carry = column // 10
            written += f"{(column + int(slip)) % 10}{carry}"
        return _answer(written)


def _answer(text: str) -> npt.NDArray[np.int32]:
    return np.append(_ids(text), np.int32(eos_token_id(TOKENIZER)))


class StudyTask(Task, TaughtTask, Protocol):
    """What a task of the study can do."""


TASKS: dict[str, Callable[[], StudyTask]] = {
    "running_sums": lambda: RunningSums(TOKENIZER),
    "sorting": Sorting,
    "scratchpad_addition": ScratchpadAddition,
}

SLIPS = {"running_sums": 0.1, "sorting": 0.1, "scratchpad_addition": 0.11}
"""Probability a step that the teacher slips: one answer of five or six is right."""


def answer_tokens(task: StudyTask) -> int:
    """Return the tokens of an answer, end token included: all answers of one task here have one length."""
    rng = np.random.default_rng(0)
    return len(task.noisy_answer(task.sample(rng), rng, slip_probability=0.0))
