import json
import sys
import types
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # it has no types
    EventAccumulator,
)

from buffer.errors import InvalidSettings
from learner.run_log import RunLog
from learner.step import Progress
from services.report import NothingTrained, read_metrics


def test_a_resumed_run_appends_and_tensorboard_forgets_the_updates_done_again(tmp_path: Path) -> None:
    for first, rewards in ((0, (0.1, 0.2, 0.3)), (1, (0.7, 0.8))):
        log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=first)
        for offset, reward in enumerate(rewards, start=1):
            log.write(Progress(updates=first + offset, clock=first + offset + 10), {"reward/mean": reward})
        log.close()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"updates": 1, "version": 11, "reward/mean": 0.1}
    assert [line["updates"] for line in lines] == [1, 2, 3, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, round(event.value, 3)) for event in events.Scalars("reward/mean")]
    assert scalars == [(1, 0.1), (2, 0.7), (3, 0.8)]


def test_a_line_that_a_crash_cut_off_costs_neither_the_next_one_nor_the_report(tmp_path: Path) -> None:
    for update in (1, 2):
        log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=update - 1)
        log.write(Progress(updates=update, clock=update), {"reward/mean": 0.5})
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"updates": 9, "rew')  # the learner was killed here

    records = read_metrics(tmp_path / "metrics.jsonl")

    assert [record["updates"] for record in records] == [1, 2]


def test_a_run_log_with_half_a_line_alone_has_no_update(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"updates": 1, "rew')

    with pytest.raises(NothingTrained, match="has no update"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_run_has_a_page_of_its_own_at_weights_and_biases_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the names of wandb.init alone: the package is no dependency of the tests."""
    begun: list[dict[str, str]] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: begun.append(settings) or types.SimpleNamespace(finish=lambda: None)  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    for directory in ("one", "one", "other"):
        (tmp_path / directory).mkdir(exist_ok=True)
        RunLog(tmp_path / directory, run_name="team/run:1", wandb_project="p", updates_done=0).close()

    ids = [settings["id"] for settings in begun]
    assert ids[0] == ids[1] != ids[2]
    assert all(name.isalnum() for name in ids)
    assert {settings["name"] for settings in begun} == {"team/run:1"}


def test_weights_and_biases_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a missing package

    with pytest.raises(InvalidSettings, match=r"learner.wandb_project='p' but wandb is not installed.*pip install"):
        RunLog(tmp_path, run_name="run", wandb_project="p", updates_done=0)
