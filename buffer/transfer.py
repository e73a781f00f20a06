"""Recorded groups of another time or run: what a table may take of them."""

import json
from collections.abc import Iterator
from typing import Any

from buffer.browsing import GroupQuery
from buffer.codec import group_from_record
from buffer.errors import InvalidRecord, NotFound
from buffer.table import ReplayTable
from buffer.types import SCHEMA, Group, Trajectory


def adopted(group: Group, run_id: str, *, foreign: bool) -> Group:
    """Return a recorded group as one of run `run_id`; `foreign` = drawn by other weights, its versions become None.

    Raises InvalidRecord for a group of another run that is not declared foreign: its versions mean nothing here.
    """
    if foreign:
        trajectories = tuple(_without_versions(trajectory) for trajectory in group.trajectories)
        return group.model_copy(update={"run_id": run_id, "trajectories": trajectories})
    if group.run_id != run_id:
        raise InvalidRecord(
            f"group {group.group_id!r} was recorded by run {group.run_id!r}, whose versions mean nothing in {run_id!r}",
            hint="import it as foreign",
        )
    return group


def _without_versions(trajectory: Trajectory) -> Trajectory:
    spans = tuple(span.model_copy(update={"version": None}) for span in trajectory.spans)
    return trajectory.model_copy(update={"spans": spans})


def stored_groups(table: ReplayTable) -> Iterator[Group]:
    """Yield the groups that are stored now, oldest first, less those that are removed before their turn.

    Each one at most once; groups that are inserted meanwhile are left out.
    """
    newest = table.browse(GroupQuery(limit=1)).groups
    query = GroupQuery(oldest_first=True)
    while newest:
        page = table.browse(query)
        for summary in page.groups:
            if summary.sequence > newest[0].sequence:
                return
            try:
                yield table.get(summary.group_id)
            except NotFound:
                continue  # removed meanwhile
        if page.cursor is None:
            return
        query = query.model_copy(update={"cursor": page.cursor})


def plain_record(group: Group) -> dict[str, Any]:
    """Return a group as numbers, lists and maps that read back to exactly the same group."""
    return group.model_dump(mode="json")


def json_line(group: Group) -> bytes:
    """Return a group as one line of JSON that reads back to exactly the same group."""
    record = {"schema": SCHEMA, "group": plain_record(group)}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def group_of_line(line: bytes) -> Group:
    """Read a line of JSON that `json_line` wrote. Raises InvalidRecord for everything else."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {"schema", "group"}:
        raise InvalidRecord("a line is one JSON document of `schema` and `group`")
    if document["schema"] != SCHEMA:
        raise InvalidRecord(f"the record has schema {document['schema']!r:.60}, this build reads {SCHEMA}")
    return group_from_record(document["group"])
