"""`stalewise export` and `stalewise import`: a file on one side, a running service on the other."""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from buffer.client import HttpTable, ServiceClient
from buffer.codec import encode_group
from buffer.errors import InvalidRecord, InvalidSettings, StalewiseError
from buffer.transfer import group_of_line, json_line
from buffer.types import Group, InsertOutcome

_BATCH_GROUPS = 64
_BATCH_BYTES = 16 << 20
_STORED = (InsertOutcome.ACCEPTED, InsertOutcome.DUPLICATE)


class ImportStopped(StalewiseError):
    """Some groups of a file were not taken."""


def export_file(client: ServiceClient, path: Path) -> int:
    """Write the stored groups to `path`, whole or not at all, and return their number.

    Raises InvalidSettings for a file that cannot be written, and what the service names.
    """
    write = _write_parquet if _is_parquet(path) else _write_lines
    partial = path.with_name(path.name + ".partial")

    def attempt() -> int:
        with client.stream("/v1/export") as chunks:
            return write(partial, map(group_of_line, _lines(chunks)))

    try:
        num_groups = client.retry(attempt, what="GET /v1/export")
        partial.replace(path)
    except OSError as error:
        raise InvalidSettings(
            f"cannot write {path}: {error.strerror}", hint="give a file that can be written"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return num_groups


def import_file(
    client: ServiceClient,
    path: Path,
    *,
    foreign: bool,
    patience_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Counter[InsertOutcome]:
    """Insert the groups of a file and return how many had each outcome; nothing is sent before all of it was read.

    A table that is full is asked again until it took nothing for `patience_s`. Raises InvalidRecord for a bad record,
    naming its place, and ImportStopped for one that the table refuses or has no room for; what was stored before stays,
    and is a duplicate when the import is made again.
    """
    for _ in _read(path):
        pass
    table, outcomes = HttpTable(client), Counter[InsertOutcome]()
    for batch in _batches(_read(path)):
        waited_s = 0.0
        while batch:
            submission = table.import_groups(batch, foreign=foreign)
            stored = [result.outcome for result in submission.results if result.outcome in _STORED]
            outcomes.update(stored)
            waited_s = 0.0 if stored else waited_s
            for result in submission.results:
                is_final = result.outcome not in (*_STORED, InsertOutcome.FULL)
                if is_final or (result.outcome is InsertOutcome.FULL and waited_s >= patience_s):
                    raise ImportStopped(
                        f"group {result.group_id!r} is {result.outcome.value}: {result.reason}",
                        hint=f"{outcomes.total()} groups before it are stored; import the file again to go on",
                    )
            by_outcome = zip(batch, submission.results, strict=True)
            batch = [group for group, result in by_outcome if result.outcome is InsertOutcome.FULL]
            if batch:
                pause_s = submission.retry_after_s or 1.0
                sleep(pause_s)
                waited_s += pause_s
    return outcomes


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".jsonl", ".parquet"):
        raise InvalidSettings(f"{path} is neither .jsonl nor .parquet", hint="the name of the file says its format")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InvalidSettings(f"{path} needs pyarrow", hint="in the clone: pip install '.[parquet]', or use .jsonl")
    return path.suffix == ".parquet"


def _read(path: Path) -> Iterator[Group]:
    """Yield the groups of a file. Raises InvalidSettings, or InvalidRecord that names the place in the file."""
    records = _read_parquet(path) if _is_parquet(path) else _read_lines(path)
    try:
        yield from records
    except OSError as error:
        raise InvalidSettings(f"cannot read {path}: {error.strerror}", hint="give an existing file") from error


def _read_lines(path: Path) -> Iterator[Group]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield group_of_line(line)
            except InvalidRecord as error:
                raise InvalidRecord(f"{path}, line {number}: {error.detail}", hint=error.hint) from error


def _write_lines(path: Path, groups: Iterable[Group]) -> int:
    num_groups = 0
    with path.open("wb") as file:
        for group in groups:
            file.write(json_line(group))
            num_groups += 1
    return num_groups


def _read_parquet(path: Path) -> Iterator[Group]:
    from services.parquet import read_parquet

    return read_parquet(path)


def _write_parquet(path: Path, groups: Iterable[Group]) -> int:
    from services.parquet import write_parquet

    return write_parquet(path, groups)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _batches(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Yield groups in batches that stay well under the size of a body, a single larger group alone."""
    batch: list[Group] = []
    batch_bytes = 0
    for group in groups:
        size_bytes = len(encode_group(group))
        if batch and (len(batch) == _BATCH_GROUPS or batch_bytes + size_bytes > _BATCH_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(group)
        batch_bytes += size_bytes
    if batch:
        yield batch
