"""Looking at stored groups over HTTP: pages of summaries, one group, all of them as a stream."""

import itertools
from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from buffer.browsing import GroupPage, GroupQuery
from buffer.table import ReplayTable
from buffer.transfer import json_line, stored_groups
from buffer.types import IDENTIFIER_PATTERN, Split
from buffer.wire import JSON_LINES, StoredGroup, parse
from services.bodies import answer, wanted_media_type
from services.context import ServiceContext
from services.operations import Operation

Cursor = Annotated[str | None, Query(description="The cursor of the page before; none = the first page.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Groups of a page at most.")]
PromptId = Annotated[str | None, Query(pattern=IDENTIFIER_PATTERN, description="Only groups of this prompt.")]
Unused = Annotated[bool, Query(description="Only train groups that were never handed out.")]


def browse_operations(context: ServiceContext) -> Sequence[Operation]:
    """Return the operations that read stored groups and change nothing."""
    table = context.table

    async def list_groups(
        request: Request,
        cursor: Cursor = None,
        limit: Limit = 100,
        oldest_first: bool = False,
        split: Split | None = None,
        prompt_id: PromptId = None,
        unused: Unused = False,
    ) -> Response:
        """Return one page of summaries, newest first. At most one of the filters split, prompt_id and unused."""
        wanted = wanted_media_type(request)
        given = {"cursor": cursor, "limit": limit, "oldest_first": oldest_first}
        query = parse(GroupQuery, given | {"split": split, "prompt_id": prompt_id, "unused": unused})
        return await run_in_threadpool(lambda: answer(table.browse(query), wanted))

    async def get_group(request: Request, group_id: Annotated[str, Path(pattern=IDENTIFIER_PATTERN)]) -> Response:
        """Return a stored group and what is known about it."""
        wanted = wanted_media_type(request)
        return await run_in_threadpool(lambda: answer(_stored(table, group_id), wanted))

    async def export(request: Request) -> Response:
        """Stream the groups that are stored now, oldest first, each as one line of JSON `{schema, group}`."""
        lines = map(json_line, stored_groups(table))
        first = await run_in_threadpool(next, lines, b"")  # before the status: a store that is away is still a 503
        return StreamingResponse(itertools.chain([first], lines), media_type=JSON_LINES)

    return (
        Operation(route="GET /v1/groups", endpoint=list_groups, answers={200: GroupPage}, problems=(406, 422, 503)),
        Operation(
            route="GET /v1/groups/{group_id:path}",
            endpoint=get_group,
            answers={200: StoredGroup},
            problems=(404, 406, 422, 503),
        ),
        Operation(route="GET /v1/export", endpoint=export, answers={200: (JSON_LINES,)}, problems=(503,)),
    )


def _stored(table: ReplayTable, group_id: str) -> StoredGroup:
    return StoredGroup(summary=table.summary(group_id), group=table.get(group_id))
