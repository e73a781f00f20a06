"""The real `stalewise serve`: one sentence for a bad start, a clean drain, and nothing lost by a kill."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import redis

from buffer.client import ServiceClient
from buffer.codec import encode_group
from buffer.table import SampleRequest
from buffer.weights.directory_store import DirectoryWeightStore
from services.address import read_address
from tests.factories import RUN_ID, make_group, make_manifest, parts_of
from tests.services.live import NO_RETRY, PublishingTable, ServeProcess, redis_pid, stalewise


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path)
    yield process
    process.stop()


def test_sigterm_ends_waiting_requests_with_nothing_and_leaves_nothing_behind(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    draw = {"num_groups": 1, "learner_version": 0, "request_id": "r", "timeout_s": 120}
    answers: dict[str, httpx.Response] = {}

    def wait(name: str, method: str, path: str, **parts: object) -> None:
        with httpx.Client(base_url=url, timeout=150, trust_env=False) as client:
            answers[name] = client.request(method, path, **parts)  # type: ignore[arg-type]

    threads = [
        threading.Thread(target=wait, args=("draw", "POST", "/v1/sample"), kwargs={"json": draw}),
        threading.Thread(target=wait, args=("poll", "GET", "/v1/weights/latest?wait_s=60")),
    ]
    for thread in threads:
        thread.start()
    client = ServiceClient(url, settings=NO_RETRY)
    while not client.stats()["table"]["waits"]:
        pass

    exit_code = serve.stop()
    for thread in threads:
        thread.join(30)
    client.close()

    assert exit_code == 0
    assert (answers["draw"].status_code, answers["draw"].json()) == (200, {"schema": 1, "samples": []})
    assert answers["poll"].status_code == 204
    assert read_address(serve.directory) is None
    assert not (serve.directory / "redis" / "redis.sock").exists()
    assert "Traceback" not in serve.log_path.read_text()


def test_kill_of_the_service_loses_no_acknowledged_group_and_no_published_version(serve: ServeProcess) -> None:
    with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
        table = PublishingTable(client)
        table.advance_version(3)
        assert [result.outcome.value for result in table.insert([make_group("a"), make_group("b")])] == ["accepted"] * 2
        before = table.stats()

    os.kill(serve.process.pid, signal.SIGKILL)
    # as if the kill had come between the manifest and the table of version 4
    DirectoryWeightStore(serve.directory / "weights").publish(make_manifest(4))
    serve.restart()

    with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
        table = PublishingTable(client)
        after = table.stats()
        assert after == before.model_copy(update={"latest_version": 4})
        assert client.run_info().latest_version == 4
        assert encode_group(table.get("a")) == encode_group(make_group("a"))
        assert [result.outcome.value for result in table.insert([make_group("a")])] == ["duplicate"]
        assert client.stats()["promises"] == {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory_policy": "noeviction",
        }


def test_kill_of_the_service_loses_no_held_trajectory_and_a_janitor_completes_what_it_left(
    tmp_path: Path,
) -> None:
    serve = ServeProcess(
        tmp_path,
        *("limiter.min_size=1", "limiter.error_buffer=2", "learner.groups_per_update=1"),
        *(
            "service.janitor_tick_s=0.05",
            "table.partial_group_timeout_s=1000",
        ),
    )
    first, second = parts_of("p", size=2)
    waiting = parts_of("w", size=2)
    draw = SampleRequest(num_groups=1, learner_version=0, request_id="r")
    try:
        with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
            table = PublishingTable(client)
            table.advance_version(0)
            table.insert([make_group(name) for name in "abc"])
            assert [r.outcome.value for r in table.insert_parts([first, *waiting])] == ["pending", "pending", "full"]

        os.kill(serve.process.pid, signal.SIGKILL)
        serve.restart()

        with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
            table = PublishingTable(client)
            assert table.stats().num_partial_groups == 2
            assert [r.outcome.value for r in table.insert_parts([first, waiting[1]])] == ["duplicate", "full"]
            table.sample(draw)
            deadline_s = time.monotonic() + 30
            while table.stats().num_partial_groups > 1:  # the janitor inserts what waited for the learner
                assert time.monotonic() < deadline_s, serve.log_path.read_text()
            table.sample(draw.model_copy(update={"request_id": "r2"}))
            assert [r.outcome.value for r in table.insert_parts([second])] == ["accepted"]
            assert [len(table.get(name).trajectories) for name in "pw"] == [2, 2]
            assert table.stats().inserted_total == 5
    finally:
        serve.stop()


def test_export_and_import_are_commands(serve: ServeProcess, tmp_path: Path) -> None:
    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=NO_RETRY)) as client:
        PublishingTable(client).advance_version(0)
        PublishingTable(client).insert([make_group("a"), make_group("b")])
    path, to_service = tmp_path / "groups.jsonl", ("--set", f"service.url={url}")

    exported = stalewise("export", str(path), *to_service)
    imported = stalewise("import", str(path), *to_service)
    path.write_text(path.read_text().replace("behavior_logprobs", "logprobs", 1))
    refused = stalewise("import", str(path), *to_service)

    assert (exported.returncode, exported.stdout) == (0, f"2 groups written to {path}\n")
    assert (imported.returncode, imported.stdout) == (0, "duplicate: 2\n")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "line 1: group 'a'" in refused.stderr
    assert "a missing one is not a ratio of 1" in refused.stderr


def test_death_of_its_redis_ends_the_service_with_a_sentence(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    os.kill(redis_pid(serve.directory), signal.SIGKILL)

    refused = httpx.get(f"{url}/readyz", trust_env=False)
    exit_code = serve.process.wait(60)

    assert (refused.status_code, refused.json()["error"]) == (503, "store_unavailable")
    assert exit_code == 3
    assert "stalewise: our own Redis has died" in serve.log_path.read_text()


def test_a_redis_that_cannot_write_to_its_disk_is_watched_until_it_dies(serve: ServeProcess, tmp_path: Path) -> None:
    serve.wait_until_ready()
    with redis.Redis(unix_socket_path=str(serve.directory / "redis" / "redis.sock")) as own:
        own.config_set("save", "3600 1")
        gone = tmp_path / "gone"
        gone.mkdir()
        own.config_set("dir", str(gone))
        gone.rmdir()
        own.bgsave()
        while own.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.02)
        with pytest.raises(redis.exceptions.ResponseError, match="MISCONF"):
            own.ping()
        time.sleep(2.5)  # two looks of the watch
        pid = own.info("server")["process_id"]
    os.kill(pid, signal.SIGKILL)

    assert serve.process.wait(30) == 3
    assert "stalewise: our own Redis has died" in serve.log_path.read_text()


def test_second_service_of_a_run_is_refused_while_the_first_one_lives(serve: ServeProcess) -> None:
    serve.wait_until_ready()

    second = stalewise(*serve.arguments, "--set", "redis.start_timeout_s=0.5")

    assert second.returncode == 3
    assert last_line(second.stderr).startswith(
        f"stalewise: another service, or its Redis, is using {serve.directory / 'redis'}"
    )
    assert read_address(serve.directory) is not None


def last_line(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def settings(tmp_path: Path, *changes: str) -> list[str]:
    options = [f"run.runs_dir={tmp_path}", f"run.name={RUN_ID}", "service.port=0", *changes]
    return [part for option in options for part in ("--set", option)]


def test_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        done = stalewise("serve", *settings(tmp_path, f"service.port={port}"))

    assert (done.returncode, last_line(done.stderr)) == (
        2,
        f"stalewise: port {port} of 127.0.0.1 is in use (stop what uses it, or set service.port to another one; "
        "0 takes a free one)",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "exit_code", "sentence"),
    [
        ("service.redis_url=redis://127.0.0.1:1/0", 3, "stalewise: Redis does not answer: Error 111 connecting to"),
        ("service.redis_url=nonsense", 2, "stalewise: redis url 'nonsense'"),
        ("service.host=0.0.0.0", 2, "stalewise: service.host=0.0.0.0 can be reached from other machines, but no token"),
        ("run.runs_dir=/dev/null", 2, f"stalewise: the run's directory /dev/null/{RUN_ID} cannot be written: Not a"),
        ("run.runs_dir=/proc", 2, f"stalewise: the run's directory /proc/{RUN_ID} cannot be written: "),
        ("service.prot=1", 2, "stalewise: unknown setting service.prot (did you mean service.port"),
        ("limiter.min_size=1000000", 2, "stalewise: limiter.min_size=1000000 is above table.capacity_groups=100000"),
        ("table.capacity_groups=0", 2, "stalewise: table.capacity_groups: input should be greater than or equal to 1"),
    ],
)
def test_bad_start_is_one_sentence_and_an_exit_code(tmp_path: Path, change: str, exit_code: int, sentence: str) -> None:
    done = stalewise("serve", *settings(tmp_path, change))

    assert (done.returncode, done.stdout) == (exit_code, "")
    assert last_line(done.stderr).startswith(sentence)
    assert read_address(tmp_path / RUN_ID) is None


def test_weights_of_another_run_in_the_directory_are_refused(serve: ServeProcess, tmp_path: Path) -> None:
    with closing(ServiceClient(serve.wait_until_ready(), settings=NO_RETRY)) as client:
        PublishingTable(client).advance_version(0)
    serve.stop()
    serve.directory.rename(tmp_path / "renamed")

    done = stalewise("serve", *settings(tmp_path, "run.name=renamed"))

    assert (done.returncode, last_line(done.stderr)) == (
        2,
        f"stalewise: {tmp_path / 'renamed' / 'weights'} holds weights of run {RUN_ID}, not renamed "
        "(set run.name, run.runs_dir or weights.store)",
    )


def test_stats_prints_the_statistics_of_a_living_service(serve: ServeProcess, tmp_path: Path) -> None:
    url = serve.wait_until_ready()

    by_address_file = stalewise("stats", "--json", *settings(tmp_path))
    serve.stop()
    without = stalewise("stats", "--json", *settings(tmp_path, f"service.url={url}", "client.retry_budget_s=0"))

    assert json.loads(by_address_file.stdout)["run"]["run_id"] == RUN_ID
    assert without.returncode == 3
    assert last_line(without.stderr).startswith(f"stalewise: no answer from {url} to GET /v1/stats: ")
