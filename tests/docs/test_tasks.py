"""The task that docs/tasks.md writes is one."""

import re
from pathlib import Path

import numpy as np
import pytest

from actor.settings import TaskSettings
from actor.tasks import make_task
from services.make_model import make_tokenizer
from tests.docs.conftest import REPOSITORY


def test_the_task_of_the_page_asks_judges_and_keeps_what_it_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"<!-- test:task -->\n```python\n(.*?)```", (REPOSITORY / "docs/tasks.md").read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "reversal.py").write_text(found[1])
    monkeypatch.chdir(tmp_path)
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)

    task = make_task(TaskSettings(name="reversal:Reversal", options={"num_digits": 3}), tokenizer)
    prompts = [task.sample(rng) for _ in range(1000)]
    digits = prompts[0].answer_key["digits"]

    def reward(answer: str) -> float:
        return task.reward(prompts[0], np.array([*tokenizer.encode(answer), tokenizer.eos_token_id], np.int32))

    assert tokenizer.decode(prompts[0].token_ids) == f"{digits}="
    assert (reward(digits[::-1]), reward(digits[::-1] + "0")) == (1.0, 0.0)
    assert not {prompt.prompt_id for prompt in prompts} & {prompt.prompt_id for prompt in task.held_out()}
