"""The tasks that docs/tasks.md writes are tasks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from actor.settings import TaskSettings
from actor.tasks import Prompt, Task, make_task
from services.make_model import make_tokenizer
from tests.actor.conftest import character_tokenizer
from tests.docs.conftest import REPOSITORY

EXAMPLES = dict(
    re.findall(r"<!-- test:(\w+) -->\n```python\n(.*?)```", (REPOSITORY / "docs/tasks.md").read_text(), re.DOTALL)
)


def judge(task: Task, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> float:
    ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return task.reward(prompt, np.array(ids, np.int32))


def test_the_task_of_the_page_asks_judges_and_keeps_what_it_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reversal.py").write_text(EXAMPLES["task"])
    monkeypatch.chdir(tmp_path)
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)

    task = make_task(TaskSettings(name="reversal:Reversal", options={"num_digits": 3}), tokenizer)
    prompts = [task.sample(rng) for _ in range(1000)]
    digits = prompts[0].answer_key["digits"]

    assert tokenizer.decode(prompts[0].token_ids) == f"{digits}="
    assert judge(task, tokenizer, prompts[0], digits[::-1]) == 1.0
    assert judge(task, tokenizer, prompts[0], digits[::-1] + "0") == 0.0
    assert not {prompt.prompt_id for prompt in prompts} & {prompt.prompt_id for prompt in task.held_out()}


def test_the_task_of_the_page_over_a_file_asks_by_the_chat_template_and_takes_the_last_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "word_problems.py").write_text(EXAMPLES["file"])
    rows = [{"question": f"How much is {i} times 1,000?", "answer": f"It is {i},000.\n#### {i},000"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    tokenizer, rng = character_tokenizer("".join(map(chr, range(32, 127))) + "\n"), np.random.default_rng(0)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant: "

    options = {"path": "train.jsonl", "num_held_out": 5}
    task = make_task(TaskSettings(name="word_problems:WordProblems", options=options), tokenizer)
    trained = {prompt.prompt_id for prompt in (task.sample(rng) for _ in range(100))}
    prompt = task.held_out()[3]

    assert tokenizer.decode(prompt.token_ids) == "user: How much is 3 times 1,000?\nassistant: "
    answers = ["3000", "3 times 1,000 is 3,000.0", "3000, not 4", "no idea"]
    assert [judge(task, tokenizer, prompt, answer) for answer in answers] == [1.0, 1.0, 0.0, 0.0]
    assert trained == {f"word_problems:{index}" for index in range(5, 9)}
    assert len(task.held_out()) == 5
