"""The HTTP face of a replay table: stateless, JSON and msgpack, one honest status and one error shape."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from buffer.prompts import MAX_PAGE, PromptPage
from buffer.table import PriorityUpdate, SampleRequest, ServedTable
from buffer.types import IDENTIFIER_PATTERN
from buffer.wire import (
    Heartbeat,
    LearnerReport,
    PriorityRequest,
    RunInfo,
    SampleResponse,
    ServiceStats,
    TimedSampleRequest,
)
from services.bodies import answer, install_error_shape, read_record, sample_answer, wanted_media_type
from services.browse_api import browse_operations
from services.context import ServiceContext
from services.dashboard import page_operations
from services.evaluations_api import evaluation_operations
from services.intake_api import intake_operations
from services.look_api import look_operations
from services.operations import Operation, register
from services.prometheus import metrics_operation
from services.request_ids import RequestIds
from services.security import Guard
from services.stats import run_info, service_stats
from services.weights_api import weight_operations

_LONGEST_POLL_S = 0.25
"""A draw that waits long is looked at less often, so that many waiting ones do not keep the store busy."""

Cursor = Annotated[str, Query(max_length=128, pattern=r"^[ -~]*$")]
PageLimit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Identity = Annotated[str, Path(pattern=IDENTIFIER_PATTERN)]


def create_app(context: ServiceContext, guard: Guard) -> ASGIApp:
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
        *intake_operations(context),
        *browse_operations(context),
        *_sample_operations(context),
        *weight_operations(context),
        *evaluation_operations(context),
        *_status_operations(context),
        *look_operations(context),
        metrics_operation(context),
        *page_operations(),
    )
    register(app, operations, guard)
    return RequestIds(app)


def _sample_operations(context: ServiceContext) -> Sequence[Operation]:
    table, settings = context.table, context.settings

    async def sample(request: Request) -> Response:
        """Draw groups, waiting up to `timeout_s` for the draw to become possible; no groups when it did not."""
        wanted = wanted_media_type(request)
        timed = await read_record(request, TimedSampleRequest, max_bytes=settings.max_body_bytes)
        draw = SampleRequest(**{name: value for name, value in timed if name != "timeout_s"})
        started_s = context.monotonic()
        while (response := await run_in_threadpool(_drawn, table, draw, wanted)) is None:
            waited_s = context.monotonic() - started_s
            if waited_s >= timed.timeout_s or context.closing.is_set() or await request.is_disconnected():
                return answer(SampleResponse(samples=[]), wanted)
            await asyncio.sleep(min(max(settings.poll_s, waited_s / 10), _LONGEST_POLL_S))
        return response

    async def priorities(request: Request) -> Response:
        """Give stored groups new priorities; ids that are not stored are ignored and counted."""
        wanted = wanted_media_type(request)
        posted = await read_record(request, PriorityRequest, max_bytes=settings.max_body_bytes)
        return answer(await run_in_threadpool(table.update_priorities, posted.priorities), wanted)

    async def prompts(request: Request, cursor: Cursor = "", limit: PageLimit = 100) -> Response:
        """Return the statistics of prompts, in the order of their ids, from after `cursor`."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(table.prompts(cursor, limit), wanted))

    return (
        Operation(
            route="POST /v1/sample",
            endpoint=sample,
            body=TimedSampleRequest,
            answers={200: SampleResponse},
            problems=(406, 409, 410, 413, 415, 422, 503),
        ),
        Operation(
            route="POST /v1/priorities",
            endpoint=priorities,
            body=PriorityRequest,
            answers={200: PriorityUpdate},
            problems=(406, 413, 415, 422, 503),
        ),
        Operation(
            route="GET /v1/prompts",
            endpoint=prompts,
            answers={200: PromptPage},
            problems=(406, 422, 503),
        ),
    )


def _drawn(table: ServedTable, draw: SampleRequest, media_type: str) -> Response | None:
    """Return the answer to a draw; None while it must wait."""
    chunks = table.sample_encoded(draw)
    first = next(chunks, None)
    return None if first is None else sample_answer(draw.num_groups, first, chunks, media_type)


def _status_operations(context: ServiceContext) -> Sequence[Operation]:
    async def run(request: Request) -> Response:
        """Return the identity of the run and the limits of submissions."""
        wanted = wanted_media_type(request)
        return answer(await run_in_threadpool(run_info, context), wanted)

    async def stats(request: Request) -> Response:
        """Return everything a dashboard needs, in constant time."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(service_stats(context), wanted))

    async def heartbeat(request: Request, actor_id: Identity) -> Response:
        """Keep an actor's heartbeat in place of its previous one."""
        beat = await read_record(request, Heartbeat, max_bytes=settings.max_body_bytes)
        await run_in_threadpool(context.presence.heartbeat, actor_id, beat)
        return Response(status_code=204)

    async def learner_metrics(request: Request) -> Response:
        """Keep the learner's report in place of its previous one, and the groups that it has just trained on."""
        report = await read_record(request, LearnerReport, max_bytes=settings.max_body_bytes)
        await run_in_threadpool(context.presence.report, report)
        if report.trained:
            await run_in_threadpool(context.trained.push, report.trained)
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
