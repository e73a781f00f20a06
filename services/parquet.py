"""Groups as Parquet: one row per trajectory, the rows of a group one after another, its fields repeated in each.

Needs pyarrow, which is an extra: a wheel of 55 MB, for one command.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow.parquet import ParquetFile, ParquetWriter

from buffer.codec import group_from_record
from buffer.errors import InvalidRecord
from buffer.transfer import plain_record
from buffer.types import SCHEMA, Group

_GROUP_FIELDS = ("run_id", "group_id", "prompt_id", "split")
_BATCH_ROWS = 512
_SCHEMA_KEY = b"stalewise.schema"


def write_parquet(path: Path, groups: Iterable[Group]) -> int:
    """Write groups to a file and return their number."""
    num_groups = 0
    with ParquetWriter(path, _schema(), compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for group in groups:
            rows += _rows(group)
            num_groups += 1
            if len(rows) >= _BATCH_ROWS:
                writer.write_table(arrow.Table.from_pylist(rows, schema=_schema()))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema=_schema()))
    return num_groups


def read_parquet(path: Path) -> Iterator[Group]:
    """Yield the groups of a file. Raises InvalidRecord that names the row."""
    try:
        file = ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise InvalidRecord(f"{path} is not Parquet: {error}") from error
    with file:
        written = (file.schema_arrow.metadata or {}).get(_SCHEMA_KEY, b"none").decode()
        if written != str(SCHEMA):
            raise InvalidRecord(f"{path} has schema {written}, this build reads {SCHEMA}")
        batches = file.iter_batches(batch_size=_BATCH_ROWS)
        rows = enumerate(row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
        for fields, members in itertools.groupby(rows, key=lambda row: [row[1].get(name) for name in _GROUP_FIELDS]):
            numbers, trajectories = zip(*members, strict=True)
            try:
                yield _group(fields, trajectories)
            except InvalidRecord as error:
                raise InvalidRecord(f"{path}, row {numbers[0]}: {error.detail}", hint=error.hint) from error


def _rows(group: Group) -> list[dict[str, Any]]:
    record = plain_record(group)
    fields = {name: record[name] for name in _GROUP_FIELDS}
    return [fields | trajectory for trajectory in record["trajectories"]]


def _group(fields: list[Any], rows: tuple[dict[str, Any], ...]) -> Group:
    trajectories = [
        {name: value for name, value in row.items() if name not in _GROUP_FIELDS}
        | {"columns": row.get("columns") or {}}
        for row in rows
    ]
    return group_from_record(dict(zip(_GROUP_FIELDS, fields, strict=True)) | {"trajectories": trajectories})


def _schema() -> Any:
    """Return the Arrow schema: float32 and int32 as in the record, so that nothing is rounded."""
    text, ids, numbers = arrow.string(), arrow.list_(arrow.int32()), arrow.list_(arrow.float32())
    span = arrow.struct({"start": arrow.int64(), "end": arrow.int64(), "version": arrow.int64()})
    real = arrow.float64()
    sampling = arrow.struct({"temperature": real, "top_p": real, "top_k": arrow.int64(), "min_p": real})
    columns = {
        **dict.fromkeys(_GROUP_FIELDS, text),
        "trajectory_id": text,
        "prompt_ids": ids,
        "response_ids": ids,
        "response_mask": arrow.list_(arrow.bool_()),
        "behavior_logprobs": numbers,
        "spans": arrow.list_(span),
        "sampling": sampling,
        "reward": real,
        "finish_reason": text,
        "token_rewards": numbers,
        "episode_id": text,
        "kept_token_ids": ids,
        "kept_token_counts": ids,
        "distribution_logprobs": numbers,
        "columns": arrow.map_(text, numbers),
    }
    return arrow.schema(columns, metadata={_SCHEMA_KEY: str(SCHEMA)})
