"""What the dashboard looks at beside the statistics: the history, the groups just trained on, the text of tokens."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from buffer.trained import TrainedGroup, TrainedPage
from buffer.types import IDENTIFIER_PATTERN
from services.bodies import answer, wanted_media_type
from services.context import ServiceContext
from services.history import HistoryPage
from services.operations import Operation
from services.token_text import token_text_operation

After = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Only points that began then or later; Unix s.")]


def look_operations(context: ServiceContext) -> Sequence[Operation]:
    """Return the operations of the dashboard that read and change nothing."""

    async def history(request: Request, after_s: After = 0.0) -> Response:
        """Return the run's numbers over time, in a bounded number of points."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(context.history.read(after_s=after_s), wanted))

    async def trained_groups(request: Request) -> Response:
        """Return summaries of the groups trained on of late, newest first."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(TrainedPage(groups=context.trained.summaries()), wanted))

    async def trained_group(request: Request, group_id: Annotated[str, Path(pattern=IDENTIFIER_PATTERN)]) -> Response:
        """Return a group that was trained on of late, with its ratios; it may have left the table."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(context.trained.get(group_id), wanted))

    return (
        Operation(route="GET /v1/history", endpoint=history, answers={200: HistoryPage}, problems=(406, 422, 503)),
        Operation(route="GET /v1/trained", endpoint=trained_groups, answers={200: TrainedPage}, problems=(406, 503)),
        Operation(
            route="GET /v1/trained/{group_id:path}",
            endpoint=trained_group,
            answers={200: TrainedGroup},
            problems=(404, 406, 422, 503),
        ),
        token_text_operation(context),
    )
