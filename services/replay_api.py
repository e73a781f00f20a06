"""The HTTP face of a replay table: stateless, JSON and msgpack, one honest status and one error shape."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from buffer.codec import group_from_record
from buffer.errors import InvalidRecord
from buffer.table import SampleRequest
from buffer.types import Group, InsertOutcome, InsertResult, LimiterState
from buffer.wire import (
    Envelope,
    Heartbeat,
    InsertRefused,
    InsertRequest,
    InsertResponse,
    LearnerReport,
    LimiterStatus,
    Limits,
    RunInfo,
    SampleResponse,
    ServiceStats,
    TimedSampleRequest,
    decode,
    parse,
)
from services.bodies import answer, install_error_shape, read_body, sample_chunks, sent_media_type, wanted_media_type
from services.context import ServiceContext
from services.dashboard import page_operations
from services.operations import Operation, register
from services.security import Guard
from services.weights_api import weight_operations

_STATUS: Mapping[InsertOutcome, int] = {
    InsertOutcome.ACCEPTED: 200,
    InsertOutcome.DUPLICATE: 200,
    InsertOutcome.CONFLICT: 409,
    InsertOutcome.STALE: 409,
    InsertOutcome.OVERSIZE: 413,
    InsertOutcome.INVALID: 422,
    InsertOutcome.FULL: 429,
}
_HINTS: Mapping[int, str] = {
    409: "do not send these groups again",
    413: "send smaller groups",
    422: "correct the groups; nothing of them was stored",
    429: "wait for Retry-After seconds and send the same groups again",
}

_LONGEST_POLL_S = 0.25
"""A draw that waits long is looked at less often, so that many waiting ones do not keep the store busy."""

Identity = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]


def create_app(context: ServiceContext, guard: Guard) -> FastAPI:
    """Return the ASGI application of one run."""
    app = FastAPI(
        title="Stalewise replay service",
        version="1",
        description="Bodies are JSON or application/msgpack, by Content-Type and Accept, with one schema: arrays are "
        "lists in JSON and raw little-endian bytes (int32, float32, one byte per bool) in msgpack.",
        docs_url=None,
        redoc_url=None,
    )
    install_error_shape(app)
    operations = (
        *_table_operations(context),
        *weight_operations(context),
        *_status_operations(context, guard),
        *page_operations(),
    )
    register(app, operations, guard)
    return app


def _table_operations(context: ServiceContext) -> Sequence[Operation]:
    table, settings = context.table, context.settings

    async def insert(request: Request) -> Response:
        """Insert groups: one outcome each. A common outcome has its own status, different ones are a 207."""
        media_type, wanted = sent_media_type(request), wanted_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        results = await run_in_threadpool(_insert, context, raw, media_type)
        return _insert_answer(results, wanted, retry_after_s=settings.retry_after_s)

    async def sample(request: Request) -> Response:
        """Draw groups, waiting up to `timeout_s` for the draw to become possible; no groups when it did not."""
        media_type, wanted = sent_media_type(request), wanted_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        timed = parse(TimedSampleRequest, decode(raw, media_type))
        draw = SampleRequest(**{name: value for name, value in timed if name != "timeout_s"})
        started_s = context.monotonic()
        while not (samples := await run_in_threadpool(table.sample, draw)):
            waited_s = context.monotonic() - started_s
            if waited_s >= timed.timeout_s or context.closing.is_set() or await request.is_disconnected():
                break
            await asyncio.sleep(min(max(settings.poll_s, waited_s / 10), _LONGEST_POLL_S))
        return StreamingResponse(sample_chunks(samples, wanted), media_type=wanted)

    async def get_group(request: Request, group_id: Identity) -> Response:
        """Return a stored group."""
        wanted = wanted_media_type(request)
        return answer(await run_in_threadpool(table.get, group_id), wanted)

    return (
        Operation(
            route="POST /v1/groups",
            endpoint=insert,
            body=InsertRequest,
            answers={200: InsertResponse, 207: InsertResponse},
            refusals=dict.fromkeys(sorted(set(_STATUS.values()) - {200}), InsertRefused),
            problems=(406, 413, 415, 422, 503),
        ),
        Operation(
            route="GET /v1/groups/{group_id:path}",
            endpoint=get_group,
            answers={200: Group},
            problems=(404, 406, 422, 503),
        ),
        Operation(
            route="POST /v1/sample",
            endpoint=sample,
            body=TimedSampleRequest,
            answers={200: SampleResponse},
            problems=(406, 409, 413, 415, 422, 503),
        ),
    )


def _insert(context: ServiceContext, raw: bytes, media_type: str) -> list[InsertResult]:
    """Judge each submitted group: the malformed ones are invalid, the table decides about the rest."""
    records = parse(Envelope[object], decode(raw, media_type)).groups
    groups: list[Group] = []
    verdicts: list[InsertResult | None] = []
    for record in records:
        try:
            groups.append(group_from_record(record))
            verdicts.append(None)
        except InvalidRecord as error:
            named = record.get("group_id") if isinstance(record, dict) else None
            group_id = named[:128] if isinstance(named, str) else ""
            verdicts.append(InsertResult(group_id=group_id, outcome=InsertOutcome.INVALID, reason=error.detail))
    judged = iter(context.table.insert(groups) if groups else ())
    return [verdict or next(judged) for verdict in verdicts]


def _insert_answer(results: list[InsertResult], media_type: str, *, retry_after_s: int) -> Response:
    full = any(result.outcome is InsertOutcome.FULL for result in results)
    headers = {"Retry-After": str(retry_after_s)} if full else None
    statuses = {_STATUS[result.outcome] for result in results}
    status = statuses.pop() if len(statuses) == 1 else 207
    if status in (200, 207):
        return answer(InsertResponse(results=results), media_type, status=status, headers=headers)
    first = results[0]
    refused = InsertRefused(error=first.outcome, detail=first.reason, hint=_HINTS[status], results=results)
    return answer(refused, media_type, status=status, headers=headers)


def _status_operations(context: ServiceContext, guard: Guard) -> Sequence[Operation]:
    started_s = context.monotonic()

    async def run(request: Request) -> Response:
        """Return the identity of the run and the limits of submissions."""
        wanted = wanted_media_type(request)
        return answer(await run_in_threadpool(_run_info, context, guard), wanted)

    async def stats(request: Request) -> Response:
        """Return everything a dashboard needs, in constant time."""
        wanted = wanted_media_type(request)
        return answer(await run_in_threadpool(_stats, context, guard, started_s), wanted)

    async def heartbeat(request: Request, actor_id: Identity) -> Response:
        """Keep an actor's heartbeat in place of its previous one."""
        media_type = sent_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        beat = parse(Heartbeat, decode(raw, media_type))
        await run_in_threadpool(context.presence.heartbeat, actor_id, beat)
        return Response(status_code=204)

    async def learner_metrics(request: Request) -> Response:
        """Keep the learner's report in place of its previous one."""
        media_type = sent_media_type(request)
        raw = await read_body(request, max_bytes=settings.max_body_bytes)
        await run_in_threadpool(context.presence.report, parse(LearnerReport, decode(raw, media_type)))
        return Response(status_code=204)

    async def healthz() -> Response:
        """Say that the process answers."""
        return PlainTextResponse("ok")

    async def readyz() -> Response:
        """Say that the store answers too."""
        await run_in_threadpool(context.table.stats)
        return PlainTextResponse("ready")

    settings = context.settings
    return (
        Operation(route="GET /v1/run", endpoint=run, answers={200: RunInfo}, problems=(406, 503)),
        Operation(route="GET /v1/stats", endpoint=stats, answers={200: ServiceStats}, problems=(406, 503)),
        Operation(
            route="POST /v1/actors/{actor_id:path}/heartbeat",
            endpoint=heartbeat,
            body=Heartbeat,
            answers={204: None},
            problems=(413, 415, 422, 503),
        ),
        Operation(
            route="POST /v1/learner/metrics",
            endpoint=learner_metrics,
            body=LearnerReport,
            answers={204: None},
            problems=(413, 415, 422, 503),
        ),
        Operation(route="GET /healthz", endpoint=healthz, answers={200: ("text/plain",)}),
        Operation(route="GET /readyz", endpoint=readyz, answers={200: ("text/plain",)}, problems=(503,)),
    )


def _run_info(context: ServiceContext, guard: Guard) -> RunInfo:
    latest = context.weights.latest()
    return RunInfo(
        run_id=context.run_id,
        model_fingerprint=latest.model_fingerprint if latest else None,
        latest_version=latest.version if latest else -1,
        limits=Limits(
            max_body_bytes=context.settings.max_body_bytes,
            max_group_bytes=context.table_settings.max_group_bytes,
            capacity_groups=context.table_settings.capacity_groups,
            capacity_bytes=context.table_settings.capacity_bytes,
        ),
        tokens_required=guard.tokens_required,
    )


def _stats(context: ServiceContext, guard: Guard, started_s: float) -> ServiceStats:
    table = context.table.stats()
    waiting = {wait.who for wait in table.waits}
    state = LimiterState.FLOWING
    if waiting:
        state = LimiterState.LEARNER_WAITS if "learner" in waiting else LimiterState.ACTORS_WAIT
    learner, actors = context.presence.read()
    return ServiceStats(
        run=_run_info(context, guard),
        table=table,
        limiter=LimiterStatus(state=state, settings=context.limiter_settings),
        weights=context.weights.status(),
        learner=learner,
        actors=actors,
        promises=dict(context.promises()),
        uptime_s=context.monotonic() - started_s,
    )
