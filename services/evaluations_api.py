"""The evaluations face of the service: claims by actors, their results, and what is known."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Request, Response
from starlette.concurrency import run_in_threadpool

from buffer.errors import InvalidRequest
from buffer.evaluations import ClaimAnswer, Evaluation, EvaluationBoard, EvaluationClaim
from services.bodies import answer, read_record, wanted_media_type
from services.context import ServiceContext
from services.operations import Operation

Version = Annotated[int, Path(ge=0, lt=1 << 53)]


def evaluation_operations(context: ServiceContext) -> Sequence[Operation]:
    """Return the evaluations operations of one service."""
    evaluations, settings = context.evaluations, context.settings

    async def read(request: Request) -> Response:
        """Return the newest evaluations, the best version, and who evaluates what."""
        media_type = wanted_media_type(request)
        return answer(await run_in_threadpool(evaluations.read), media_type)

    async def claim(request: Request) -> Response:
        """Offer to evaluate a version; at most one actor at a time is granted one of an interval of versions."""
        wanted = wanted_media_type(request)
        asked = await read_record(request, EvaluationClaim, max_bytes=settings.max_body_bytes)
        return answer(await run_in_threadpool(evaluations.claim, asked), wanted)

    async def record(request: Request, version: Version) -> Response:
        """Hand in the result of a granted claim; again is harmless."""
        evaluation = await read_record(request, Evaluation, max_bytes=settings.max_body_bytes)
        if evaluation.version != version:
            raise InvalidRequest(f"the path says version {version}, the evaluation {evaluation.version}")
        await run_in_threadpool(evaluations.record, evaluation)
        return Response(status_code=204)

    return (
        Operation(route="GET /v1/evaluations", endpoint=read, answers={200: EvaluationBoard}, problems=(406, 503)),
        Operation(
            route="POST /v1/evaluations/claims",
            endpoint=claim,
            body=EvaluationClaim,
            answers={200: ClaimAnswer},
            problems=(406, 413, 415, 422, 503),
        ),
        Operation(
            route="PUT /v1/evaluations/{version}",
            endpoint=record,
            body=Evaluation,
            answers={204: None},
            problems=(409, 413, 415, 422, 503),
        ),
    )
