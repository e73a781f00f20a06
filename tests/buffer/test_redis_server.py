"""Our own Redis keeps what it acknowledged, dies with its parent, and says why it does not start."""

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from buffer.codec import encode_group
from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisClient, check_promises, connect
from buffer.redis_server import RedisSettings, redis_server
from buffer.redis_table import RedisTable
from buffer.selectors import Fifo, Selector, Weighted
from buffer.table import SampleRequest, TableSettings
from buffer.weighting import PriorityWeighting
from tests.factories import RUN_ID, make_group

ALWAYS = RedisSettings(appendfsync="always")
OPEN = RateLimiterSettings(min_size=1, error_buffer=1e9)

INSERT_FOREVER = """
import sys
from tests.buffer.test_redis_server import open_table
from tests.factories import make_group

table = open_table(sys.argv[1])
number = 0
while True:
    groups = [make_group(f"{sys.argv[2]}-{number + i}") for i in range(5)]
    for result in table.insert(groups):
        print(result.group_id, result.outcome.value, flush=True)
    number += 5
"""
SERVE_FOREVER = """
import sys, time
from pathlib import Path
from buffer.redis_server import RedisSettings, redis_server
with redis_server(Path(sys.argv[1]), RedisSettings()) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def open_table(url: str) -> RedisTable:
    table = RedisTable(connect(url), TableSettings(), OPEN, RUN_ID)
    table.advance_version(0)
    return table


def start(script: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def pid_of(client: RedisClient) -> int:
    info: Any = client.info("server")
    return int(info["process_id"])


def wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.02)


def accepted_lines(process: "subprocess.Popen[str]") -> list[str]:
    """Return the ids that a killed inserter reported as accepted; its last line may be cut off."""
    assert process.stdout is not None
    with process.stdout as lines:
        return [line.split()[0] for line in lines if line.endswith(" accepted\n")]


def test_every_accepted_group_survives_kill_9_of_redis_exactly_once(tmp_path: Path) -> None:
    with redis_server(tmp_path, ALWAYS) as url:
        inserters = [start(INSERT_FOREVER, url, name) for name in ("left", "right")]
        table = open_table(url)
        while table.stats().num_groups < 60:
            time.sleep(0.02)
        os.kill(pid_of(connect(url)), signal.SIGKILL)
        for inserter in inserters:
            inserter.kill()
            inserter.wait()
    accepted = [group_id for inserter in inserters for group_id in accepted_lines(inserter)]

    with redis_server(tmp_path, ALWAYS) as url:
        table = open_table(url)
        retried = table.insert([make_group(group_id) for group_id in accepted])

        assert len(accepted) >= 30
        assert len(set(accepted)) == len(accepted)
        assert {result.outcome.value for result in retried} == {"duplicate"}
        assert [table.get(group_id).group_id for group_id in accepted] == accepted
        stats = table.stats()
        # a group may be stored whose answer the kill cut off; the counters describe exactly what is there
        assert stats.num_groups == stats.inserted_total == stats.stored_uses[0] >= len(accepted)


def test_a_restart_finds_order_uses_weights_and_pace_as_they_were(tmp_path: Path) -> None:
    settings = TableSettings(weighting=PriorityWeighting(exponent=1.0), reuse_limit=3)
    limiter = RateLimiterSettings(samples_per_insert=1.5, min_size=2, error_buffer=3)

    def drawn(table: RedisTable, selector: Selector, request_id: str) -> dict[str, tuple[float, int]]:
        request = SampleRequest(num_groups=2, learner_version=0, request_id=request_id, selector=selector)
        return {s.group.group_id: (s.info.probability, s.info.times_sampled) for s in table.sample(request)}

    with redis_server(tmp_path, ALWAYS) as url:
        table = RedisTable(connect(url), settings, limiter, RUN_ID)
        table.advance_version(0)
        table.insert([make_group(name) for name in "abc"])
        table.update_priorities({"a": 1.0, "b": 3.0, "c": 4.0})
        first = drawn(table, Fifo(), "r0")
        held = table.insert([make_group("d"), make_group("e"), make_group("f")])
        before = table.stats()
        os.kill(pid_of(connect(url)), signal.SIGKILL)

    with redis_server(tmp_path, ALWAYS) as url:
        table = RedisTable(connect(url), settings, limiter, RUN_ID)
        after = table.stats()
        again, second = drawn(table, Fifo(), "r0"), drawn(table, Fifo(), "r1")
        weighted = drawn(table, Weighted(by="priority"), "r2")

    assert [result.outcome.value for result in held] == ["accepted", "accepted", "full"]
    assert after.model_copy(update={"waits": before.waits}) == before
    assert again == first == {"a": (1.0, 1), "b": (1.0, 1)}
    assert second == {"a": (1.0, 2), "b": (1.0, 2)}
    weights = {"a": 1.0, "b": 3.0, "c": 4.0, "d": 4.0, "e": 4.0}  # new groups enter with the largest one posted
    assert {name: chance for name, (chance, _) in weighted.items()} == {
        name: pytest.approx(weights[name] / 16) for name in weighted
    }


def test_kill_9_of_an_inserting_client_leaves_whole_groups_only(tmp_path: Path) -> None:
    with redis_server(tmp_path, RedisSettings(appendfsync="no")) as url:
        table = open_table(url)
        inserter = start(INSERT_FOREVER, url, "client")
        while table.stats().num_groups < 40:
            time.sleep(0.01)
        inserter.kill()
        inserter.wait()
        accepted = accepted_lines(inserter)

        stats = table.stats()
        ids = [f"client-{number}" for number in range(stats.num_groups)]
        assert [table.get(group_id).group_id for group_id in ids] == ids
        assert set(accepted) <= set(ids)
        assert stats.bytes == sum(len(encode_group(make_group(group_id))) for group_id in ids)
        assert stats.inserted_total == len(ids)


def test_kill_9_of_the_parent_ends_redis_and_a_restart_finds_everything(tmp_path: Path) -> None:
    parent = start(SERVE_FOREVER, str(tmp_path))
    assert parent.stdout is not None
    with parent.stdout as lines:
        url = lines.readline().strip()
    client = connect(url)
    open_table(url).insert([make_group("a"), make_group("b")])
    pid = pid_of(client)

    parent.kill()
    parent.wait()
    with redis_server(tmp_path, ALWAYS) as url:  # waits for the old one to be gone
        assert open_table(url).stats().num_groups == 2
        assert pid_of(connect(url)) != pid
    wait_until_gone(pid)


def test_leaving_the_block_ends_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path, ALWAYS) as url:
        pid = pid_of(connect(url))

    wait_until_gone(pid)


def test_second_server_on_a_directory_says_what_it_waits_for_and_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        redis_server(tmp_path, ALWAYS),
        pytest.raises(StoreUnavailable, match=f"another service, or its Redis, is using {tmp_path}"),
        redis_server(tmp_path, RedisSettings(start_timeout_s=0.1)),
    ):
        pass

    assert f"is using {tmp_path}: waiting up to 0.1 s for its end" in caplog.text


SILENT_REDIS = """#!{python}
import socket, sys, time
if "--version" not in sys.argv:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[sys.argv.index("--unixsocket") + 1])
    listener.listen()
    time.sleep(600)
"""


def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis-server").write_text(SILENT_REDIS.format(python=sys.executable))
    (tmp_path / "redis-server").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    with (
        pytest.raises(StoreUnavailable, match="our own Redis did not answer in 2 s: it wrote no log"),
        redis_server(tmp_path / "data", RedisSettings(start_timeout_s=2.0)),
    ):
        pass


def test_long_directories_work_too(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    for _ in range(2):
        with redis_server(directory, ALWAYS) as url:
            open_table(url).insert([make_group("a")])
            assert open_table(url).stats().num_groups == 1


def test_damaged_data_is_a_sentence_with_the_last_line_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\n")
    (tmp_path / "appendonlydir").write_text("Redis 7 wants a directory here")

    with pytest.raises(StoreUnavailable) as caught, redis_server(tmp_path, ALWAYS):
        pass

    assert re.match("our own Redis ended with code 1: .+", caught.value.detail)
    assert caught.value.hint == f"see {tmp_path / 'redis.log'}"


def test_a_log_of_redis_7_is_never_begun_anew_by_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "appendonlydir").mkdir(parents=True)
    monkeypatch.setattr("buffer.redis_server.shutil.which", lambda name: None)  # the wheel's own is 6.2

    with (
        pytest.raises(
            InvalidSettings, match=r"data was written by Redis 7 or newer, and .*v=6\.2\.\d+\) cannot read it"
        ),
        redis_server(tmp_path / "data", ALWAYS),
    ):
        pass


def test_promises_are_read_from_the_live_server_and_must_hold(tmp_path: Path) -> None:
    with redis_server(tmp_path, RedisSettings(appendfsync="everysec")) as url, connect(url) as client:
        promises = check_promises(client, RedisSettings(appendfsync="everysec"))
        with pytest.raises(InvalidSettings, match="appendfsync=everysec, but this run needs always"):
            check_promises(client, ALWAYS)
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(InvalidSettings, match="maxmemory-policy=allkeys-lru, but this run needs noeviction"):
            check_promises(client, RedisSettings(appendfsync="no"))

    assert promises == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory_policy": "noeviction"}


def test_a_policy_that_evicts_is_refused_even_where_the_configuration_is_hidden(tmp_path: Path) -> None:
    with redis_server(tmp_path, RedisSettings(appendfsync="everysec")) as url, connect(url) as client:
        client.acl_setuser(
            "managed", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all"], commands=["-config"]
        )
        with connect(url.replace("unix://", "unix://managed:secret@")) as hidden:
            promises = check_promises(hidden, ALWAYS)
            client.config_set("maxmemory-policy", "volatile-lru")
            with pytest.raises(InvalidSettings, match="maxmemory-policy=volatile-lru, but this run needs noeviction"):
                check_promises(hidden, ALWAYS)

    assert promises == {"appendonly": "unknown", "appendfsync": "unknown", "maxmemory_policy": "noeviction"}


def test_url_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="redis url 'localhost' cannot be read: "):
        connect("localhost")


@pytest.mark.parametrize("url", ["redis://me:hush/1@host:6379/0", "redis://:hush@host:x", "nonsense://h?password=hush"])
def test_password_of_a_url_that_is_refused_is_not_repeated(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"redis url .*\*\*\*.* cannot be read") as caught:
        connect(url)

    assert "hush" not in "".join(traceback.format_exception(caught.value))
