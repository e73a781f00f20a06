"""What brings groups in over HTTP: whole groups, single trajectories, recorded groups; one outcome each."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

from fastapi import Query, Request, Response
from starlette.concurrency import run_in_threadpool

from buffer.codec import EncodedGroup, encoded, encoded_group_from_record, group_from_record, part_from_record
from buffer.errors import InvalidRecord
from buffer.table import ServedTable
from buffer.transfer import adopted
from buffer.types import InsertOutcome, InsertResult, PartResult
from buffer.wire import (
    Envelope,
    InsertRefused,
    InsertRequest,
    InsertResponse,
    PartsEnvelope,
    PartsRefused,
    PartsRequest,
    PartsResponse,
    decode,
    parse,
)
from services.bodies import answer, read_body, sent_media_type, wanted_media_type
from services.context import ServiceContext
from services.operations import Operation

R = TypeVar("R", bound=InsertResult)
T = TypeVar("T")

log = logging.getLogger(__name__)

_WRONG = frozenset({InsertOutcome.CONFLICT, InsertOutcome.OVERSIZE, InsertOutcome.INVALID})
"""Outcomes that say that something is wrong with the sender; the others happen on a good day."""

STATUS: Mapping[InsertOutcome, int] = {
    InsertOutcome.ACCEPTED: 200,
    InsertOutcome.DUPLICATE: 200,
    InsertOutcome.PENDING: 202,
    InsertOutcome.CONFLICT: 409,
    InsertOutcome.STALE: 409,
    InsertOutcome.GROUP_CLOSED: 409,
    InsertOutcome.OVERSIZE: 413,
    InsertOutcome.INVALID: 422,
    InsertOutcome.FULL: 429,
}
_HINTS: Mapping[int, str] = {
    409: "do not send these again",
    413: "send smaller groups",
    422: "correct them; nothing of them was stored",
    429: "wait for Retry-After seconds and send the same again",
}
_REFUSED = (409, 413, 422, 429)
_PROBLEMS = (406, 413, 415, 422, 503)


def intake_operations(context: ServiceContext) -> Sequence[Operation]:
    """Return the operations that store groups."""
    table, settings = context.table, context.settings

    async def insert(request: Request) -> Response:
        """Insert groups: one outcome each. A common outcome has its own status, different ones are a 207."""
        media_type, wanted = sent_media_type(request), wanted_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        results = await run_in_threadpool(_insert, table, raw, media_type)
        return _answer(results, InsertResponse, InsertRefused, wanted, settings.retry_after_s)

    async def insert_parts(request: Request) -> Response:
        """Insert trajectories of groups that are not complete yet: one outcome each, as for groups, or `pending`."""
        media_type, wanted = sent_media_type(request), wanted_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        results = await run_in_threadpool(_insert_parts, table, raw, media_type)
        return _answer(results, PartsResponse, PartsRefused, wanted, settings.retry_after_s)

    async def import_groups(
        request: Request,
        foreign: Annotated[
            bool, Query(description="Take them as data that this run's weights did not draw: versions become null.")
        ] = False,
    ) -> Response:
        """Insert groups that GET /v1/export gave, of this run with their versions, of another one only as foreign."""
        media_type, wanted = sent_media_type(request), wanted_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)

        def read(record: object) -> EncodedGroup:
            return encoded(adopted(group_from_record(record), context.run_id, foreign=foreign))

        results = await run_in_threadpool(_insert, table, raw, media_type, read)
        return _answer(results, InsertResponse, InsertRefused, wanted, settings.retry_after_s)

    return (
        Operation(
            route="POST /v1/groups",
            endpoint=insert,
            body=InsertRequest,
            answers={200: InsertResponse, 207: InsertResponse},
            refusals=dict.fromkeys(_REFUSED, InsertRefused),
            problems=_PROBLEMS,
        ),
        Operation(
            route="POST /v1/trajectories",
            endpoint=insert_parts,
            body=PartsRequest,
            answers={200: PartsResponse, 202: PartsResponse, 207: PartsResponse},
            refusals=dict.fromkeys(_REFUSED, PartsRefused),
            problems=_PROBLEMS,
        ),
        Operation(
            route="POST /v1/import",
            endpoint=import_groups,
            body=InsertRequest,
            answers={200: InsertResponse, 207: InsertResponse},
            refusals=dict.fromkeys(_REFUSED, InsertRefused),
            problems=_PROBLEMS,
        ),
    )


def _insert(
    table: ServedTable,
    raw: bytes,
    media_type: str,
    read: Callable[[object], EncodedGroup] = encoded_group_from_record,
) -> list[InsertResult]:
    """Judge each submitted group: the malformed ones are invalid, the table decides about the rest."""
    records = parse(Envelope[object], decode(raw, media_type)).groups
    groups, faults = _read(records, read)
    table.count_malformed(groups=len(faults))
    judged = iter(table.insert_encoded(groups) if groups else ())
    return [
        InsertResult(group_id=_id_of(record, "group_id"), outcome=InsertOutcome.INVALID, reason=faults[index])
        if index in faults
        else next(judged)
        for index, record in enumerate(records)
    ]


def _insert_parts(table: ServedTable, raw: bytes, media_type: str) -> list[PartResult]:
    """Judge each submitted part: the malformed ones are invalid, the table decides about the rest."""
    records = parse(PartsEnvelope[object], decode(raw, media_type)).trajectories
    parts, faults = _read(records, part_from_record)
    table.count_malformed(parts=len(faults))
    judged = iter(table.insert_parts(parts) if parts else ())
    return [
        PartResult(
            group_id=_id_of(record, "group_id"),
            trajectory_id=_id_of(record, "trajectory", "trajectory_id"),
            outcome=InsertOutcome.INVALID,
            reason=faults[index],
        )
        if index in faults
        else next(judged)
        for index, record in enumerate(records)
    ]


def _read(records: Sequence[object], read: Callable[[object], T]) -> tuple[list[T], dict[int, str]]:
    """Return the good records, in order, and what is wrong with the others by their index."""
    good: list[T] = []
    faults: dict[int, str] = {}
    for index, record in enumerate(records):
        try:
            good.append(read(record))
        except InvalidRecord as error:
            faults[index] = str(error)
    return good, faults


def _id_of(record: object, *path: str) -> str:
    """Return the id that a malformed record seems to have, cut to the length of an id."""
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    return record[:128] if isinstance(record, str) else ""


def _answer(
    results: list[R],
    accepted: Callable[..., InsertResponse | PartsResponse],
    refused: Callable[..., InsertRefused | PartsRefused],
    media_type: str,
    retry_after_s: int,
) -> Response:
    if bad := [result for result in results if result.outcome in _WRONG]:  # one line, however much nonsense is sent
        log.warning(
            "%d of %d are refused, the first as %s: %s",
            len(bad),
            len(results),
            bad[0].outcome,
            bad[0].reason,
            extra={"group_id": bad[0].group_id},
        )
    full = any(result.outcome is InsertOutcome.FULL for result in results)
    headers = {"Retry-After": str(retry_after_s)} if full else None
    statuses = {STATUS[result.outcome] for result in results}
    status = statuses.pop() if len(statuses) == 1 else 207
    if status < 400:
        return answer(accepted(results=results), media_type, status=status, headers=headers)
    first = results[0]
    problem = refused(error=first.outcome, detail=first.reason, hint=_HINTS[status], results=results)
    return answer(problem, media_type, status=status, headers=headers)
