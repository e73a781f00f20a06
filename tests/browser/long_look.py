"""The long look: a real run with its learner and actors, and two minutes of polling with 100,000 groups in the table.

Run by `make test-browser`. The bounds are what docs/dashboard.md promises.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgpack
import pytest

from buffer.connection import ServiceClient, body_of
from buffer.wire import MSGPACK
from tests.browser.conftest import Tab
from tests.factories import RUN_ID, make_group
from tests.services.live import DEMO_MODEL, PublishingTable, ServeProcess

NUM_GROUPS = 100_000
MAX_HEAP_BYTES = 10e6  # 3.2e6 were measured
MAX_CPU_SHARE = 0.1  # 0.021 was measured
POLL_S = 120
BATCH, CALLS = 500, 200


@contextmanager
def process(log_path: Path, *arguments: str) -> Iterator[None]:
    with log_path.open("ab") as log:
        child = subprocess.Popen([sys.executable, "-m", "services.cli", *arguments], stdout=log, stderr=log)
        try:
            yield
        finally:
            child.terminate()
            child.wait(60)


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def measure(tab: Tab, seconds: int) -> tuple[float, float]:
    """Return the heap after garbage collection, and the share of one core that the process of the page used."""
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Performance.enable")

    def read() -> dict[str, float]:
        return {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}

    before = read()
    tab.page.wait_for_timeout(1000 * seconds)
    after = read()
    session.send("HeapProfiler.collectGarbage")
    busy_s = after["ProcessTime"] - before["ProcessTime"]
    return read()["JSHeapUsedSize"], busy_s / (after["Timestamp"] - before["Timestamp"])


def insert_all(client: ServiceClient, num_groups: int) -> None:
    """Insert groups that differ by their ids alone, encoded once."""
    one = msgpack.packb(make_group("g000000", prompt_id="p0000").model_dump())
    packer = msgpack.Packer()
    for start in range(0, num_groups, BATCH):
        groups = [
            one.replace(b"g000000", b"g%06d" % number).replace(b"p0000", b"p%04d" % (number % 5000))
            for number in range(start, start + BATCH)
        ]
        head = packer.pack_map_header(2) + packer.pack("schema") + packer.pack(1) + packer.pack("groups")
        body = head + packer.pack_array_header(BATCH) + b"".join(groups)
        answered = body_of(client.request("POST", "/v1/groups", body=body, content_type=MSGPACK, accept=MSGPACK))
        # a batch whose answer came too late is sent again
        assert {result["outcome"] for result in answered["results"]} <= {"accepted", "duplicate"}


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(900)
def test_two_minutes_of_polling_over_100_000_groups_stay_small(tmp_path: Path, tab: Tab) -> None:
    service = ServeProcess(
        tmp_path,
        f"limiter.min_size={NUM_GROUPS}",
        f"table.capacity_groups={NUM_GROUPS}",
        "redis.appendfsync=everysec",
        f"run.model={DEMO_MODEL}",
    )
    try:
        url = service.wait_until_ready()
        with closing(ServiceClient(url)) as client:
            PublishingTable(client).advance_version(0)
            insert_all(client, NUM_GROUPS)
            tab.page.goto(url)
            tab.wait_for_text("#tiles", f"{NUM_GROUPS:,}")
            tab.page.locator("#groups").scroll_into_view_if_needed()
            tab.page.select_option("#browse-kind", "all")
            tab.wait_for_text("#browse-note", "there are more")
            heap_bytes, cpu_share = measure(tab, POLL_S)
            used_s = cpu_s(service.process.pid)
            latencies_ms = sorted(_timed_ms(client) for _ in range(CALLS))
            stats_cpu_ms = 1000 * (cpu_s(service.process.pid) - used_s) / CALLS
    finally:
        service.stop()

    report = {
        "heap_MB": round(heap_bytes / 1e6, 1),
        "cpu_share": round(cpu_share, 3),
        "stats_p50_ms": round(latencies_ms[CALLS // 2], 1),
        "stats_cpu_ms": round(stats_cpu_ms, 1),
    }
    sys.stdout.write(f"\nthe page and the statistics over {NUM_GROUPS:,} groups: {json.dumps(report)}\n")
    assert heap_bytes < MAX_HEAP_BYTES
    assert cpu_share < MAX_CPU_SHARE
    assert tab.complaints == []


def _timed_ms(client: ServiceClient) -> float:
    began_s = time.perf_counter()
    client.stats()
    return 1000 * (time.perf_counter() - began_s)


def wait_for_updates(tab: Tab, updates: int) -> None:
    tab.page.wait_for_function(
        "(wanted) => Number(document.querySelector('#tiles').innerText.match(/updates\\s+(\\d+)/)?.[1] ?? 0) >= wanted",
        arg=updates,
        timeout=200_000,
    )


@pytest.mark.timeout(600)
def test_page_follows_a_real_run_through_a_restart_of_its_service(tmp_path: Path, tab: Tab) -> None:
    settings = (
        f"run.runs_dir={tmp_path}",
        f"run.name={RUN_ID}",
        f"run.model={DEMO_MODEL}",
        "learner.groups_per_update=4",
        "limiter.min_size=8",
        "learner.total_updates=200",
        "actor.group_size=4",
        "actor.groups_per_batch=4",
        "actor.max_new_tokens=17",
    )
    service = ServeProcess(tmp_path, *settings)
    try:
        url = service.wait_until_ready()
        service.arguments += options(f"service.port={url.rsplit(':', 1)[1]}")
        given = options(*settings, f"service.url={url}")
        with (
            process(tmp_path / "learner.log", "learn", *given),
            process(tmp_path / "actor.log", "act", "--actor-id", "actor-0", *given),
            closing(ServiceClient(url)) as client,
        ):
            tab.page.goto(url)
            wait_for_updates(tab, 5)
            assert tab.complaints == []
            service.stop()
            tab.wait_for_text("#state", "no answer from the service")
            service.restart()
            service.wait_until_ready()
            tab.wait_for_text("#state", "live")
            wait_for_updates(tab, 20)
            stats = client.stats()
            shown = int(tab.text("#outcomes").split("accepted ")[1].split()[0].replace(",", ""))
            assert 0 <= stats["table"]["outcomes"]["accepted"] - shown <= 40
            assert "actor-0" in tab.text("#actor-list")
            tab.page.locator("#groups").scroll_into_view_if_needed()
            tab.wait_for_text("#browse-note", "groups trained on lately")
            tab.page.click("#group-list button.link >> nth=0")
            tab.page.wait_for_selector("#responses .tokens span")
            assert "<eos>" in tab.text("#responses")
    finally:
        service.stop()
