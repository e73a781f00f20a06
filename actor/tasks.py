"""Tasks: where prompts come from, and how a response is judged.

Both work on token ids through the model's own tokenizer, so that a task never assumes a vocabulary.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from actor.end_tokens import eos_token_id
from actor.prompting import Prompting, as_chat, as_it_is
from actor.settings import TaskSettings
from buffer.errors import InvalidSettings

HELD_OUT_PROMPTS = 512
"""Size of the fixed evaluation set: a standard error of 2 points or less on an accuracy."""

HELD_OUT_SEED = 512_001
"""Draws the held-out prompts of the running sums: the same in every run, whatever its seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question."""

    prompt_id: str
    """Stable: the same question has the same id in every run."""
    token_ids: npt.NDArray[np.int32]  # [P]
    answer_key: Mapping[str, Any]
    """What the verifier needs; opaque to everyone but the task."""


@runtime_checkable
class Task(Protocol):
    """A source of prompts with a verifier. What is trained on is never a held-out prompt."""

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Draw one prompt to train on."""
        ...

    def held_out(self) -> list[Prompt]:
        """Return the fixed evaluation prompts, each once."""
        ...

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """Judge a response to a prompt of this task, its end token included if it was drawn.

        With several batches in flight as many threads call it.
        """
        ...


class RunningSums:
    """Prompt: digits and `=`. Answer: the running sums modulo 10, then the end token. Reward 1 only if all is right.

    5 0 7 2 =  ->  5 5 2 4 <eos>      (num_digits = 4)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, num_digits: int = 16) -> None:
        if not 4 <= num_digits <= 100:
            raise InvalidSettings(
                f"task option num_digits={num_digits} must be between 4 and 100",
                hint=f"fewer than 4 digits leave no room for {HELD_OUT_PROMPTS} held-out prompts",
            )
        self._num_digits = num_digits
        self._digit_ids = np.array([_single_token(tokenizer, str(digit)) for digit in range(10)], np.int32)
        self._equals_id = _single_token(tokenizer, "=")
        self._eos_id = eos_token_id(tokenizer)
        self._held_out = self._draw_held_out()
        self._held_out_ids = frozenset(prompt.prompt_id for prompt in self._held_out)

    def sample(self, rng: np.random.Generator) -> Prompt:
        """See Task. A draw that hits a held-out prompt is drawn again."""
        while True:
            prompt = self._prompt(rng.integers(0, 10, self._num_digits))
            if prompt.prompt_id not in self._held_out_ids:
                return prompt

    def held_out(self) -> list[Prompt]:
        """See Task."""
        return list(self._held_out)

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """See Task."""
        sums = np.cumsum(prompt.answer_key["digits"]) % 10
        return float(np.array_equal(response_ids, self._answer(sums)))

    def noisy_answer(
        self, prompt: Prompt, rng: np.random.Generator, *, slip_probability: float
    ) -> npt.NDArray[np.int32]:
        """Return the answer [num_digits + 1] of a teacher whose total slips now and then, and who goes on from there.

        Each step slips with `slip_probability`, by 1 to 9. Supervised warm-up imitates it.
        """
        digits = prompt.answer_key["digits"]
        slips = rng.integers(1, 10, digits.size) * (rng.random(digits.size) < slip_probability)
        return self._answer(np.cumsum(digits + slips) % 10)

    def _answer(self, sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return np.append(self._digit_ids[sums], np.int32(self._eos_id))

    def _prompt(self, digits: npt.NDArray[np.int64]) -> Prompt:
        text = "".join(map(str, digits))
        token_ids = np.append(self._digit_ids[digits], np.int32(self._equals_id))
        return Prompt(prompt_id=f"running_sums:{text}", token_ids=token_ids, answer_key={"digits": digits})

    def _draw_held_out(self) -> list[Prompt]:
        rng = np.random.default_rng(HELD_OUT_SEED)
        prompts: dict[str, Prompt] = {}
        while len(prompts) < HELD_OUT_PROMPTS:
            prompt = self._prompt(rng.integers(0, 10, self._num_digits))
            prompts[prompt.prompt_id] = prompt
        return list(prompts.values())


class ReasoningGym:
    """Any task of the reasoning-gym package: its question by `prompting`, its verifier's score as reward."""

    NUM_ITEMS = 100_000
    """Items are made on demand from their index: the first HELD_OUT_PROMPTS are held out, the rest is for training.
    The option `size` sets another number; a few tasks make all items at once, or have fewer."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, JsonValue],
        *,
        prompting: Prompting,
    ) -> None:
        import reasoning_gym  # 2 s and 100 MB that the running sums do not need
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            close = difflib.get_close_matches(name, ["running_sums", *DATASETS], n=3, cutoff=0.4)
            raise InvalidSettings(
                f"task {name!r} is neither running_sums nor one of the {len(DATASETS)} tasks of reasoning-gym",
                hint=f"did you mean {', '.join(close)}?" if close else "see reasoning_gym.factory.DATASETS",
            )
        try:
            self._dataset = reasoning_gym.create_dataset(
                name, **{"seed": HELD_OUT_SEED, "size": self.NUM_ITEMS, **options}
            )
        except (TypeError, AssertionError, ValueError) as error:  # how its configurations refuse an option
            raise InvalidSettings(
                f"reasoning-gym task {name} refuses the options {dict(options)}: {error}",
                hint="see the fields of its configuration class; a task with few questions wants a smaller size",
            ) from error
        if len(self._dataset) <= HELD_OUT_PROMPTS:
            raise InvalidSettings(
                f"task option size={len(self._dataset)} leaves nothing to train on: {HELD_OUT_PROMPTS} are held out"
            )
        self._name = name
        self._tokenizer = tokenizer
        self._prompting = prompting
        self._prompt(0)  # a tokenizer that cannot express the task is refused here
        self._held_out_questions = frozenset(self._dataset[index]["question"] for index in range(HELD_OUT_PROMPTS))

    def sample(self, rng: np.random.Generator) -> Prompt:
        """See Task. Raises InvalidSettings when the task has no question beyond the held-out ones."""
        for _ in range(1000):  # another index may hold the question of a held-out one
            index = int(rng.integers(HELD_OUT_PROMPTS, len(self._dataset)))
            if self._dataset[index]["question"] not in self._held_out_questions:
                return self._prompt(index)
        raise InvalidSettings(
            f"reasoning-gym task {self._name} has hardly a question but the {len(self._held_out_questions)} held out",
            hint="choose task options that make it larger",
        )

    def held_out(self) -> list[Prompt]:
        """See Task."""
        return [self._prompt(index) for index in range(HELD_OUT_PROMPTS)]

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """See Task: the score of the package's own verifier, usually in [0, 1]."""
        answer = self._tokenizer.decode(response_ids.tolist(), skip_special_tokens=True)
        return float(self._dataset.score_answer(answer, prompt.answer_key))

    def _prompt(self, index: int) -> Prompt:
        item = self._dataset[index]
        question: str = item["question"]
        if self._tokenizer.decode(self._tokenizer.encode(question, add_special_tokens=False)) != question:
            raise InvalidSettings(
                f"the tokenizer cannot express the prompts of reasoning-gym task {self._name}: {question[:60]!r} "
                "does not survive encoding and decoding",
                hint="choose a model whose tokenizer covers text",
            )
        token_ids = np.array(self._prompting(question), np.int32)
        return Prompt(prompt_id=f"{self._name}:{index}", token_ids=token_ids, answer_key=item)


def make_task(settings: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return the task that the settings name. Raises InvalidSettings with the nearest names."""
    if settings.system_text is not None and not settings.chat_template:
        raise InvalidSettings("actor.task.system_text is set without actor.task.chat_template = true, which it needs")
    if settings.chat_template and (settings.name == "running_sums" or ":" in settings.name):
        raise InvalidSettings(
            f"task {settings.name} writes its prompts itself: actor.task.chat_template says nothing to it",
            hint="leave it out; docs/tasks.md shows how a task of yours uses the template",
        )
    if ":" in settings.name:
        return _imported(settings.name, tokenizer, settings.options)
    if settings.name != "running_sums":
        prompting = (
            as_chat(tokenizer, system_text=settings.system_text) if settings.chat_template else as_it_is(tokenizer)
        )
        return ReasoningGym(settings.name, tokenizer, settings.options, prompting=prompting)
    num_digits = settings.options.get("num_digits", 16)
    if set(settings.options) - {"num_digits"} or type(num_digits) is not int:
        raise InvalidSettings(
            f"task running_sums refuses the options {settings.options}",
            hint="its only option is the integer num_digits",
        )
    return RunningSums(tokenizer, num_digits=num_digits)


def _imported(name: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, JsonValue]) -> Task:
    """Return the task that `module:callable` makes of the tokenizer and the options; what it raises itself passes."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of an installed module
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidSettings(
            f"task {name!r} cannot be imported: {error}",
            hint="write module:class, of an installed package or of a file in the working directory",
        ) from error
    try:
        inspect.signature(factory).bind(tokenizer, **options)
    except TypeError as error:
        raise InvalidSettings(f"task {name!r} refuses the options {dict(options)}: {error}") from error
    task = factory(tokenizer, **options)
    if not isinstance(task, Task):
        raise InvalidSettings(
            f"task {name!r} is no task: {type(task).__name__} lacks one of sample, held_out and reward",
            hint="docs/tasks.md has an example",
        )
    return task


def _single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) != 1 or tokenizer.decode(token_ids) != text:
        raise InvalidSettings(
            f"the tokenizer cannot express {text!r} as one token, which the running sums need",
            hint="make a model with `stalewise make-model`",
        )
    return token_ids[0]
