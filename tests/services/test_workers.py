"""`stalewise serve` with several workers: whichever is killed, nothing accepted is lost, and it is replaced."""

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

from buffer.client import ClientSettings, HttpTable, ServiceClient
from buffer.errors import ServiceUnreachable
from services.address import read_address
from tests.factories import make_group
from tests.services.live import NO_RETRY, PublishingTable, ServeProcess, workers_of

PATIENT = ClientSettings(retry_budget_s=60.0, retry_first_s=0.02, retry_max_s=0.2)
DRAW = {"num_groups": 1, "learner_version": 0, "request_id": "r", "timeout_s": 120}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path, "service.workers=2", "limiter.error_buffer=1e9")
    yield process
    process.stop()


def wait_for_workers(serve: ServeProcess, *, without: set[int]) -> set[int]:
    """Return the workers once there are two and none of them is one of the dead."""
    deadline_s = time.monotonic() + 60
    while len(workers := workers_of(serve)) != 2 or workers & without:
        assert time.monotonic() < deadline_s, serve.log_path.read_text()
        time.sleep(0.02)
    return workers


def test_kill_9_of_workers_under_load_loses_nothing_accepted_and_each_is_replaced(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=PATIENT)) as client:
        PublishingTable(client).advance_version(0)
    accepted: dict[str, list[str]] = {name: [] for name in "abc"}
    stop = threading.Event()

    def write(name: str) -> None:
        with closing(ServiceClient(url, settings=PATIENT)) as client:
            while not stop.is_set():
                group_id = f"{name}{len(accepted[name])}"
                (result,) = HttpTable(client).insert([make_group(group_id)])
                assert result.outcome.value in ("accepted", "duplicate")
                accepted[name].append(group_id)

    threads = [threading.Thread(target=write, args=(name,)) for name in accepted]
    for thread in threads:
        thread.start()
    dead: set[int] = set()
    for _ in range(2):
        before = sum(map(len, accepted.values()))
        while sum(map(len, accepted.values())) < before + 20:
            time.sleep(0.01)
        victim = min(wait_for_workers(serve, without=dead))
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
    wait_for_workers(serve, without=dead)
    stop.set()
    for thread in threads:
        thread.join(60)

    told = [group_id for ids in accepted.values() for group_id in ids]
    with closing(ServiceClient(url, settings=PATIENT)) as client:
        table = HttpTable(client)
        assert [table.get(group_id).group_id for group_id in told] == told
        stats = table.stats()
        assert stats.num_groups == stats.inserted_total == stats.outcomes["accepted"] == len(told) > 40
    assert serve.log_path.read_text().count("was killed by signal 9: starting another one") == 2


def test_sigterm_drains_every_worker_and_leaves_no_process_behind(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=PATIENT)) as client:
        PublishingTable(client).advance_version(0)
    workers = wait_for_workers(serve, without=set())
    answers: list[httpx.Response] = []
    connected = threading.Barrier(9)

    def wait(number: int) -> None:
        with httpx.Client(base_url=url, timeout=150, trust_env=False) as client:
            client.get("/v1/run")
            connected.wait()
            answers.append(client.post("/v1/sample", json=DRAW | {"request_id": f"r{number}"}))

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    connected.wait()
    with closing(ServiceClient(url, settings=NO_RETRY)) as client:
        while not client.stats()["table"]["waits"]:
            pass
        for _ in range(20):  # one of them waits; the others' requests are under way and arrive before these
            client.stats()

    exit_code = serve.stop()
    for thread in threads:
        thread.join(30)

    assert exit_code == 0
    assert [(answer.status_code, answer.json()["samples"]) for answer in answers] == [(200, [])] * 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert read_address(serve.directory) is None
    assert "Traceback" not in serve.log_path.read_text()


def test_workers_do_not_outlive_a_killed_supervisor_and_the_next_one_finds_everything(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=PATIENT)) as client:
        table = PublishingTable(client)
        table.advance_version(0)
        table.insert([make_group("a")])
    workers = wait_for_workers(serve, without=set())

    serve.process.kill()
    serve.process.wait()
    deadline_s = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline_s
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    serve.restart()

    with closing(ServiceClient(serve.wait_until_ready(), settings=PATIENT)) as client:
        assert HttpTable(client).get("a").group_id == "a"


def test_workers_that_die_again_and_again_end_the_service_with_a_sentence(serve: ServeProcess) -> None:
    url = serve.wait_until_ready()
    dead: set[int] = set()

    while serve.process.poll() is None:
        for pid in workers_of(serve) - dead:
            os.kill(pid, signal.SIGKILL)
            dead.add(pid)
        time.sleep(0.02)

    assert serve.process.wait(30) == 1
    assert "workers died within 60 s, the last one was killed by signal 9" in serve.log_path.read_text()
    with pytest.raises(ServiceUnreachable), closing(ServiceClient(url, settings=NO_RETRY)) as client:
        client.stats()
