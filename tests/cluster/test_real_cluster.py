"""Three shards on three nodes of a real Redis Cluster, behind the real service with two workers."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from buffer.browsing import GroupQuery
from buffer.client import ClientSettings, HttpTable, ServiceClient
from buffer.codec import encode_group
from buffer.errors import StoreUnavailable
from buffer.selectors import Uniform, Weighted
from buffer.sharding import shard_of
from buffer.table import SampleRequest
from buffer.types import Sample
from buffer.wire import Heartbeat
from tests.cluster.conftest import NUM_SHARDS
from tests.cluster.nodes import Cluster
from tests.factories import RUN_ID, make_group
from tests.services.live import NO_RETRY, PublishingTable, ServeProcess, stalewise

PATIENT = ClientSettings(retry_budget_s=120.0, retry_first_s=0.05, retry_max_s=0.5)


def request(request_id: str, num_groups: int = 4) -> SampleRequest:
    return SampleRequest(num_groups=num_groups, learner_version=0, request_id=request_id, selector=Uniform())


def test_every_call_of_the_service_works_over_a_cluster(serve: ServeProcess, cluster: Cluster, tmp_path: Path) -> None:
    url = serve.wait_until_ready()
    names = [f"g{number}" for number in range(40)]
    with closing(ServiceClient(url, settings=NO_RETRY)) as client:
        table = PublishingTable(client)
        table.advance_version(0)
        outcomes = table.insert([make_group(name, prompt_id=f"p{name[-1]}") for name in names])
        again = table.insert([make_group(name, prompt_id=f"p{name[-1]}") for name in names])
        drawn = [table.sample(request(f"r{number}")) for number in range(10)]
        repeated = [table.sample(request(f"r{number}")) for number in range(10)]
        update = table.update_priorities({name: float(name == "g7") for name in names})
        by_priority = SampleRequest(num_groups=1, learner_version=0, request_id="w", selector=Weighted(by="priority"))
        weighted = table.sample(by_priority)
        client.heartbeat("a", Heartbeat(version=0, tokens_per_s=1.0, groups_total=1, state="generating"))
        stats, whole = table.stats(), client.stats()
        page = table.browse(GroupQuery(limit=1000))
        prompts = table.prompts(limit=5)

    assert Counter(result.outcome.value for result in outcomes) == {"accepted": 40}
    assert Counter(result.outcome.value for result in again) == {"duplicate": 40}
    for shard, node in enumerate(cluster.nodes):
        own = [name for name in names if shard_of(name, NUM_SHARDS) == shard]
        assert node.client().zcard(f"sw:{{{RUN_ID}:{shard}}}:train") == len(own) > 4
    assert [len({sample.group.group_id for sample in draw}) for draw in drawn] == [4] * 10
    assert [[s.group.group_id for s in draw] for draw in repeated] == [
        [s.group.group_id for s in draw] for draw in drawn
    ]
    assert {shard_of(draw[0].group.group_id, NUM_SHARDS) for draw in drawn} == {0, 1, 2}
    assert (update.updated, ids(weighted)) == (40, ["g7"])
    assert weighted[0].info.probability == 1.0
    assert (stats.num_groups, stats.inserted_total, stats.sampled_total) == (40, 40, 41)
    assert [actor["actor_id"] for actor in whole["actors"]] == ["a"]
    assert sorted(summary.group_id for summary in page.groups) == sorted(names)
    assert [(prompt.prompt_id, prompt.seen) for prompt in prompts.prompts] == [(f"p{n}", 8) for n in range(5)]
    exported = stalewise("export", str(tmp_path / "all.jsonl"), "--set", f"service.url={url}")
    assert exported.stdout == f"40 groups written to {tmp_path / 'all.jsonl'}\n"


def test_killed_node_is_an_honest_503_for_its_shard_and_loses_nothing_accepted(
    serve: ServeProcess, cluster: Cluster
) -> None:
    url = serve.wait_until_ready()
    with closing(ServiceClient(url, settings=PATIENT)) as client:
        PublishingTable(client).advance_version(0)
    writers = Writers(url)
    writers.wait_for(20)
    cluster.nodes[1].kill()
    writers.wait_until_stuck()
    while_away = assert_only_shard_1_is_away(url)
    cluster.nodes[1].restart()
    cluster.wait_until_formed()
    writers.wait_for(10)
    told = [*while_away, *writers.stop()]

    with closing(ServiceClient(url, settings=PATIENT)) as client:
        table = HttpTable(client)
        for group_id in told:
            assert encode_group(table.get(group_id)) == encode_group(make_group(group_id))
        stats = table.stats()
        assert stats.num_groups == stats.inserted_total == len(set(told)) == len(told)
        assert len(table.sample(request("back"))) == 4
    assert serve.process.poll() is None


def assert_only_shard_1_is_away(url: str) -> list[str]:
    """Assert who answers what; return the ids that were accepted."""
    away, alive = _new_id(1), [_new_id(0), _new_id(2)]
    with closing(ServiceClient(url, settings=NO_RETRY)) as client:
        table = HttpTable(client)
        with pytest.raises(StoreUnavailable):
            table.insert([make_group(away)])
        with pytest.raises(StoreUnavailable):
            table.sample(request("while-away"))
        results = table.insert([make_group(name) for name in alive])
        assert [result.outcome.value for result in results] == ["accepted"] * 2
        assert table.get(alive[0]).group_id == alive[0]
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        refused, ready = http.get(f"/v1/groups/{away}"), http.get("/readyz")
    assert (refused.status_code, refused.json()["error"]) == (503, "store_unavailable")
    assert ready.status_code == 503
    return alive


class Writers:
    """Three clients that insert one group after another, each until it is accepted."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._accepted: list[list[str]] = [[], [], []]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, number: int) -> None:
        """Return once each writer has got so many groups further."""
        before = list(map(len, self._accepted))
        while any(len(ids) < count + number for ids, count in zip(self._accepted, before, strict=True)):
            assert all(thread.is_alive() for thread in self._threads)
            time.sleep(0.05)

    def wait_until_stuck(self) -> None:
        """Return once every writer has met the dead shard: none of them gets on."""
        before: list[int] = []
        while before != (now := list(map(len, self._accepted))):
            before = now
            time.sleep(2.0)

    def stop(self) -> list[str]:
        """Return what was accepted."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        return [group_id for ids in self._accepted for group_id in ids]

    def _write(self, writer: int) -> None:
        with closing(ServiceClient(self._url, settings=PATIENT)) as client:
            number = 0
            while not self._stop.is_set():
                (result,) = HttpTable(client).insert([make_group(f"w{writer}-{number}")])
                assert result.outcome.value in ("accepted", "duplicate")
                self._accepted[writer].append(result.group_id)
                number += 1


def ids(draw: Sequence[Sample]) -> list[str]:
    return [sample.group.group_id for sample in draw]


def _new_id(shard: int) -> str:
    return next(name for number in range(1000) if shard_of(name := f"new{number}", NUM_SHARDS) == shard)
