"""The weights face of the service: content-addressed payloads, manifests as commits, long polls without threads."""

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from buffer.errors import InvalidRequest, RangeNotSatisfiable, RunMismatch, StoreUnavailable
from buffer.weights.manifest import Manifest
from buffer.weights.retention import check_publication
from buffer.weights.store import ServedWeightStore
from services.bodies import answer, read_record, upload_chunks, wanted_media_type
from services.context import ServiceContext
from services.operations import OCTETS, Operation

log = logging.getLogger(__name__)

_IMMUTABLE = "public, max-age=31536000, immutable"
_MAX_UPLOADS = 32
"""Payloads that are received side by side: each holds a thread for as long as its sender takes. Others wait unread."""

BlobName = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[int, Path(ge=0, lt=1 << 53)]


def weight_operations(context: ServiceContext) -> Sequence[Operation]:
    """Return the weights operations of one service; `latest` precedes `{version}`."""
    return *_blob_operations(context), *_read_operations(context), _publish_operation(context)


def _blob_operations(context: ServiceContext) -> Sequence[Operation]:
    weights, settings = context.weights, context.settings
    uploads = CapacityLimiter(_MAX_UPLOADS)  # slow senders must not take the threads that all other requests share

    async def put_blob(request: Request, sha256: BlobName) -> Response:
        """Store a payload under its sha256; storing it twice is harmless."""
        chunks = upload_chunks(request, max_bytes=settings.max_blob_bytes)
        await to_thread.run_sync(weights.put_blob, sha256, chunks, limiter=uploads)
        return Response(status_code=204)

    async def get_blob(request: Request, sha256: BlobName) -> Response:
        """Return a payload, or one range of it. It never changes: any HTTP cache may keep it."""
        return _blob_response(request, weights, sha256, await run_in_threadpool(weights.blob_bytes, sha256))

    return (
        Operation(
            route="PUT /v1/weights/blobs/{sha256}",
            endpoint=put_blob,
            body=b"",
            answers={204: None},
            problems=(413, 422, 503),
        ),
        Operation(
            route="GET /v1/weights/blobs/{sha256}",
            endpoint=get_blob,
            answers={200: b"", 206: b"", 304: None},
            problems=(404, 416, 422, 503),
        ),
    )


def _read_operations(context: ServiceContext) -> Sequence[Operation]:
    bell, weights = _VersionBell(context), context.weights

    async def latest(
        request: Request,
        after: Annotated[int, Query(ge=-1)] = -1,
        wait_s: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """Return the latest manifest once its version is above `after`; 204 when none came within `wait_s`."""
        media_type = wanted_media_type(request)
        deadline_s = context.monotonic() + wait_s
        while (version := await run_in_threadpool(weights.latest_version)) <= after:
            left_s = deadline_s - context.monotonic()
            if left_s <= 0 or context.closing.is_set():
                return Response(status_code=204)
            await bell.wait(version, left_s)
        manifest = await run_in_threadpool(weights.latest, after=after)
        return Response(status_code=204) if manifest is None else answer(manifest, media_type)

    async def manifest_of(request: Request, version: Version) -> Response:
        """Return one version's manifest."""
        media_type = wanted_media_type(request)
        return answer(await run_in_threadpool(weights.manifest, version), media_type)

    return (
        Operation(
            route="GET /v1/weights/latest",
            endpoint=latest,
            answers={200: Manifest, 204: None},
            problems=(406, 422, 503),
        ),
        Operation(
            route="GET /v1/weights/{version}",
            endpoint=manifest_of,
            answers={200: Manifest},
            problems=(404, 406, 422, 503),
        ),
    )


def _publish_operation(context: ServiceContext) -> Operation:
    async def publish(request: Request, version: Version) -> Response:
        """Commit a version whose payloads are stored; the table's clock advances with it."""
        manifest = await read_record(request, Manifest, max_bytes=context.settings.max_body_bytes)
        if manifest.version != version:
            raise InvalidRequest(f"the path says version {version}, the manifest {manifest.version}")
        if manifest.run_id != context.run_id:
            raise RunMismatch(f"the manifest is of run {manifest.run_id}, this service serves {context.run_id}")
        await run_in_threadpool(_commit, context, manifest)
        log.info("version %d is published", version, extra={"version": version})
        return Response(status_code=204)

    return Operation(
        route="PUT /v1/weights/{version}",
        endpoint=publish,
        body=Manifest,
        answers={204: None},
        problems=(404, 409, 413, 415, 422, 503),
    )


def _commit(context: ServiceContext, manifest: Manifest) -> None:
    """Tell the table first: whoever sees the version may at once submit what it drew, which would be refused else.

    A death in between leaves the table ahead by one version, until the next one is published.
    """
    latest = context.weights.latest()
    if latest is None or latest.version != manifest.version:
        check_publication(manifest, latest, context.weights.blob_bytes)
    context.table.advance_version(manifest.version)
    context.weights.publish(manifest)


class _VersionBell:
    """Wakes all requests that wait for a version; one look at the store per poll_s, however many wait."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._watch: asyncio.Task[None] | None = None

    async def wait(self, version: int, timeout_s: float) -> None:
        """Return when another version than `version` is published, the service drains, or the time is over.

        A watch that another request began looks for a change from the same version, or ends at its next look.
        """
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._change_from(version))
        await asyncio.wait({self._watch}, timeout=timeout_s)

    async def _change_from(self, version: int) -> None:
        while not self._context.closing.is_set():
            await asyncio.sleep(self._context.weights.poll_s)
            if await run_in_threadpool(self._context.weights.latest_version) != version:
                return


def _blob_response(request: Request, weights: ServedWeightStore, sha256: str, size: int) -> Response:
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": _IMMUTABLE, "Accept-Ranges": "bytes"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    asked = _asked_range(request, size) if request.headers.get("if-range", etag) == etag else None
    if asked is not None:
        (start, end), status = asked, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    return _Streamed(weights.blob_range(sha256, start, end), end - start, status_code=status, headers=headers)


def _asked_range(request: Request, size: int) -> tuple[int, int] | None:
    """Return [start, end) of a single byte range; None to send all, which RFC 9110 allows for any other Range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "").strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise RangeNotSatisfiable(f"the range {match.group(0)} lies outside the payload of {size} bytes")
    return start, end


class _Streamed(Response):
    """Sends chunks of a known size in all: the next one is read while the last one is on its way."""

    media_type = OCTETS

    def __init__(
        self, chunks: Iterator[bytes], num_bytes: int, *, status_code: int, headers: Mapping[str, str]
    ) -> None:
        super().__init__(status_code=status_code, headers=headers)
        self._chunks = chunks
        self._left = num_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette's Response. Nothing more is read for a caller that hung up."""
        chunk = await self._next()  # before the status: what is gone meanwhile is still a 404
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        hung_up = asyncio.create_task(_hung_up(receive))
        try:
            while self._left and not hung_up.done():
                upcoming = asyncio.ensure_future(self._next())
                try:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                finally:
                    chunk = await upcoming
        finally:
            hung_up.cancel()
        if not self._left:
            await send({"type": "http.response.body", "body": chunk})

    async def _next(self) -> bytes:
        """Return the next chunk; none is asked for beyond the last. Raises StoreUnavailable."""
        if not self._left:
            return b""
        chunk = await run_in_threadpool(next, self._chunks, b"")
        if not chunk:
            raise StoreUnavailable(f"a payload became {self._left} bytes shorter while it was sent")
        self._left -= len(chunk)
        return chunk


async def _hung_up(receive: Receive) -> None:
    """Return when the caller has gone, or has everything."""
    while (await receive())["type"] != "http.disconnect":
        pass
