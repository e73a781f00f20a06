"""An actor whose spool is on a disk that fails for a while: it waits, says so, and delivers everything."""

import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from actor.status import Activity
from buffer.types import InsertOutcome
from tests.actor.publishing import publish, wait_until
from tests.actor.test_loop import SETTINGS, Actor


@pytest.fixture
def actor(tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> Actor:
    return Actor(tmp_path, model_dir, tokenizer)


def test_a_disk_that_refuses_to_take_a_group_pauses_generation_and_loses_nothing(
    actor: Actor, keyframes: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = actor.directory / "spool" / "000000000004.partial"  # where the second group of the second batch goes
    actor.inbox.away = True

    with actor.running():
        obstacle.mkdir()
        publish(actor.store, actor.model_dir, keyframes[0], 0)
        wait_until(lambda: actor.state == Activity.WAITING_SERVICE)
        time.sleep(5 * SETTINGS.retry_s)
        assert actor.spool.num_groups == 3
        assert "Is a directory" in actor.status.heartbeat(0).detail
        obstacle.rmdir()
        wait_until(lambda: actor.spool.num_groups >= 6)
        actor.inbox.away = False
        wait_until(lambda: actor.spool.num_groups == 0 and actor.inbox.inserted > 8)

    assert caplog.text.count("cannot be written, groups wait: ") == 1
    assert actor.status.outcomes == {InsertOutcome.ACCEPTED: actor.inbox.inserted}
    assert len(actor.inbox.offered) == len(set(actor.inbox.offered)) == actor.inbox.inserted


def test_a_spooled_group_that_cannot_be_read_for_a_while_is_said_and_delivered_then(
    actor: Actor, keyframes: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, kept = actor.directory / "spool" / "000000000002.group", actor.directory / "kept"
    publish(actor.store, actor.model_dir, keyframes[0], 0)
    actor.inbox.away = True

    with actor.running():
        wait_until(lambda: actor.spool.num_groups >= 4)
        spooled = [group.group_id for group in actor.spool.oldest(4)]
        path.rename(kept)
        path.mkdir()  # what cannot be read as a file
        actor.inbox.away = False
        wait_until(lambda: "groups go to the spool: the spool" in caplog.text)
        path.rmdir()
        kept.rename(path)
        wait_until(lambda: actor.spool.num_groups == 0 and actor.inbox.inserted > 4)

    assert actor.inbox.offered[:4] == spooled
    assert actor.status.outcomes == {InsertOutcome.ACCEPTED: actor.inbox.inserted}
