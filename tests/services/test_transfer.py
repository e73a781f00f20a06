"""Export and import: the same groups come back, and what cannot be corrected for is refused with its reason."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from buffer.codec import encode_group
from buffer.connection import ServiceClient
from buffer.errors import InvalidRecord, InvalidSettings, ServiceUnreachable, StalewiseError, StoreUnavailable
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import SampleRequest, TableSettings
from buffer.transfer import group_of_line, json_line, stored_groups
from buffer.types import Group, SamplingSettings, VersionSpan
from services.transfer import ImportStopped, export_file, import_file
from tests.factories import RUN_ID, make_group, make_trajectory
from tests.services.live import NO_RETRY, make_context, serving

OPEN = RateLimiterSettings(min_size=1, error_buffer=1e9)


def awkward_group(group_id: str = "awkward") -> Group:
    """A group whose numbers have no short decimal form, with every optional field in use or absent."""
    return make_group(
        group_id,
        trajectories=[
            make_trajectory(
                f"{group_id}-0",
                response_mask=[True, False, True, True],
                behavior_logprobs=[-0.1, 0.0, -1e-30, -3.4e38],
                spans=[VersionSpan(start=0, end=1, version=0), VersionSpan(start=1, end=4, version=1)],
                sampling=SamplingSettings(temperature=0.7, top_p=0.9, top_k=0, min_p=0.0),
                kept_token_ids=[8, 9, 10, 2],
                kept_token_counts=[1, 0, 2, 1],
                reward=0.1 + 0.2,
                token_rewards=[1 / 3, 0.0, -0.0, 2 / 3],
                episode_id="e",
                columns={"entropy": [0.1, -0.0, 3.4e38, 1e-45], "b": [1, 2, 3, 4]},
            ),
            make_trajectory(
                f"{group_id}-1",
                response_ids=[1, 0],
                behavior_logprobs=[math.log(2 / 3), math.log(0.1)],
                distribution_logprobs=[math.log(p) for p in (1 / 3, 2 / 3, 0.1, 0.9)],
                reward=-1e18,
            ),
        ],
    )


def table_of(*groups: Group, settings: TableSettings | None = None) -> MemoryTable:
    table = MemoryTable(settings or TableSettings(), OPEN, RUN_ID)
    table.advance_version(1)
    assert [result.outcome.value for result in table.insert(groups)] == ["accepted"] * len(groups)
    return table


@pytest.fixture
def client_of(tmp_path: Path) -> Iterator["Services"]:
    services = Services(tmp_path)
    yield services
    services.close()


class BreakingTable(MemoryTable):
    """A table whose store goes away after some groups were read."""

    def __init__(self, num_reads: int) -> None:
        super().__init__(TableSettings(), OPEN, RUN_ID)
        self._reads_left = num_reads

    def get(self, group_id: str) -> Group:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise StoreUnavailable("gone")
        return super().get(group_id)


class Services:
    """Clients of services over given tables."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._stack = directory, ExitStack()

    def __call__(self, table: MemoryTable) -> ServiceClient:
        url = self._stack.enter_context(serving(make_context(self._directory / "service", table)))
        return self._stack.enter_context(closing(ServiceClient(url, settings=NO_RETRY)))

    def close(self) -> None:
        self._stack.close()


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.parquet"])
def test_round_trip_is_exact(client_of: Services, tmp_path: Path, name: str) -> None:
    groups = [make_group("b"), awkward_group(), make_group("a")]
    source, target = table_of(*groups), table_of()

    num_exported = export_file(client_of(source), tmp_path / name)
    outcomes = import_file(client_of(target), tmp_path / name, foreign=False, patience_s=0)

    assert (num_exported, dict(outcomes)) == (3, {"accepted": 3})
    assert [encode_group(group) for group in stored_groups(target)] == [encode_group(group) for group in groups]


def test_import_again_stores_nothing_twice(client_of: Services, tmp_path: Path) -> None:
    client = client_of(table_of(make_group("a"), awkward_group()))
    export_file(client, tmp_path / "groups.jsonl")

    assert import_file(client, tmp_path / "groups.jsonl", foreign=False, patience_s=0) == {"duplicate": 2}


def test_export_has_what_was_stored_at_its_start_and_skips_what_left_meanwhile() -> None:
    table = table_of(*[make_group(f"g{i:03}") for i in range(250)], settings=TableSettings(reuse_limit=1))

    exported: list[str] = []
    for group in stored_groups(table):
        exported.append(group.group_id)
        if len(exported) == 1:
            table.insert([make_group("late")])
            for number in range(120):
                table.sample(SampleRequest(num_groups=1, learner_version=1, request_id=f"r{number}"))

    assert exported == ["g000", *[f"g{i:03}" for i in range(120, 250)]]


@pytest.mark.parametrize("value", ["absent", None])
def test_record_without_logprobs_is_refused_with_the_reason_and_nothing_is_imported(
    client_of: Services, tmp_path: Path, value: object
) -> None:
    line = json.loads(json_line(make_group("b")))
    line["group"]["trajectories"][1].pop("behavior_logprobs")
    if value is None:
        line["group"]["trajectories"][1]["behavior_logprobs"] = None
    path = tmp_path / "groups.jsonl"
    path.write_bytes(json_line(make_group("a")) + json.dumps(line).encode())
    table = table_of()

    with pytest.raises(InvalidRecord) as refusal:
        import_file(client_of(table), path, foreign=False, patience_s=0)

    assert f"{path}, line 2: group 'b': trajectories.1.behavior_logprobs" in str(refusal.value)
    assert "a missing one is not a ratio of 1" in str(refusal.value)
    assert table.stats().num_groups == 0


def test_parquet_without_the_column_of_logprobs_is_refused_with_the_reason(client_of: Services, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "groups.parquet"
    client = client_of(table_of(make_group("a")))
    export_file(client, path)
    parquet.write_table(parquet.read_table(path).drop_columns(["behavior_logprobs"]), path)

    with pytest.raises(InvalidRecord, match=r"row 0: group 'a'.*a missing one is not a ratio of 1"):
        import_file(client, path, foreign=False, patience_s=0)


def test_group_of_another_run_is_taken_only_as_foreign_and_then_without_versions(
    client_of: Services, tmp_path: Path
) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_bytes(json_line(make_group("a", run_id="other", version=7)))
    table = table_of(make_group("own"), settings=TableSettings(foreign_share=1.0))
    client = client_of(table)

    with pytest.raises(ImportStopped, match="recorded by run 'other', whose versions mean nothing in 'test-run'"):
        import_file(client, path, foreign=False, patience_s=0)
    outcomes = import_file(client, path, foreign=True, patience_s=0)

    assert outcomes == {"accepted": 1}
    group = table.get("a")
    assert (group.run_id, group.oldest_version, group.is_foreign) == (RUN_ID, None, True)
    assert table.stats().num_foreign == 1
    assert table.stats().outcomes == {"accepted": 2, "invalid": 1}


def test_foreign_groups_are_refused_by_a_run_that_takes_none(client_of: Services, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_bytes(json_line(make_group("a", run_id="other")))

    with pytest.raises(ImportStopped, match="'a' is invalid: some spans have no version and foreign_share is 0"):
        import_file(client_of(table_of()), path, foreign=True, patience_s=0)


def test_full_table_is_asked_again_and_given_up_in_the_end(client_of: Services, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_bytes(b"".join(json_line(make_group(name)) for name in "abc"))
    table = table_of(settings=TableSettings(capacity_groups=2))
    pauses: list[float] = []

    def learner_samples_at_the_third(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            table.sample(SampleRequest(num_groups=1, learner_version=1, request_id="r"))

    outcomes = import_file(client_of(table), path, foreign=False, patience_s=9, sleep=learner_samples_at_the_third)
    path.write_bytes(b"".join(json_line(make_group(name)) for name in "de"))
    with pytest.raises(ImportStopped, match="'d' is full: the table holds 2 groups"):
        import_file(client_of(table), path, foreign=False, patience_s=2, sleep=pauses.append)

    assert outcomes == {"accepted": 3}
    assert pauses == [1.0] * 5


@pytest.mark.parametrize(("num_reads", "error"), [(0, StoreUnavailable), (1, ServiceUnreachable)])
def test_export_that_breaks_off_leaves_no_file_and_one_that_cannot_begin_says_why(
    num_reads: int, error: type[StalewiseError], client_of: Services, tmp_path: Path
) -> None:
    table = BreakingTable(num_reads)
    table.advance_version(0)
    table.insert([make_group(f"g{i}") for i in range(3)])
    client = client_of(table)

    with pytest.raises(error):
        export_file(client, tmp_path / "groups.jsonl")

    assert list(tmp_path.glob("groups*")) == []


@pytest.mark.parametrize("name", ["groups.csv", "absent.jsonl", "absent.parquet"])
def test_unusable_file_is_a_sentence(client_of: Services, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidSettings, match=name):
        import_file(client_of(table_of()), tmp_path / name, foreign=False, patience_s=0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "one JSON document of `schema` and `group`"),
        (b'{"schema":2,"group":{}}', "schema 2, this build reads 1"),
    ],
)
def test_line_that_is_no_record_is_refused(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidRecord, match=reason):
        group_of_line(line)


def test_import_over_plain_http_needs_no_client_of_ours(client_of: Services) -> None:
    table = table_of()
    lines = [json.loads(json_line(make_group("a")))["group"], {"group_id": "b"}]

    response = httpx.post(f"{client_of(table).url}/v1/import", json={"schema": 1, "groups": lines}, trust_env=False)

    assert response.status_code == 207
    assert [result["outcome"] for result in response.json()["results"]] == ["accepted", "invalid"]
    assert "a missing one is not a ratio of 1" not in response.json()["results"][1]["reason"]
