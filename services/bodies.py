"""HTTP bodies in and out: sizes capped while reading, JSON or msgpack by headers, one error shape."""

import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import anyio.from_thread
import msgpack
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from buffer.codec import bare_record
from buffer.encoded import EncodedSample
from buffer.errors import NotAcceptable, Oversize, StalewiseError, Unauthorized, UnsupportedMediaType
from buffer.types import SCHEMA
from buffer.wire import JSON, MSGPACK, Problem, decode, encode, parse

log = logging.getLogger(__name__)

_UPLOAD_CHUNK_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)


def sent_media_type(request: Request) -> str:
    """Return the encoding of a request's body. Raises UnsupportedMediaType, for compressed bodies too."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"cannot read Content-Encoding {coding!r}", hint="send the body uncompressed")
    header = request.headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    if media_type not in (JSON, MSGPACK):
        raise UnsupportedMediaType(f"cannot read Content-Type {header!r}", hint=f"send {JSON} or {MSGPACK}")
    return media_type


def wanted_media_type(request: Request) -> str:
    """Return the encoding that the caller likes best; JSON when it does not mind. Raises NotAcceptable."""
    header = request.headers.get("accept", "*/*")
    best, best_quality = "", 0.0
    for item in header.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        offered = {JSON: JSON, MSGPACK: MSGPACK, "*/*": JSON, "application/*": JSON}.get(name)
        quality = _quality(parameters)
        if offered and quality > best_quality:
            best, best_quality = offered, quality
    if not best:
        raise NotAcceptable(f"cannot write any of Accept {header!r}", hint=f"accept {JSON} or {MSGPACK}")
    return best


def _quality(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0  # RFC 9110 knows no such quality: an offer we cannot understand is not taken
    return 1.0


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the whole body. Raises Oversize, before reading when the length is announced."""
    return b"".join([chunk async for chunk in capped(request, max_bytes=max_bytes)])


async def read_record(request: Request, model: type[M], *, max_bytes: int) -> M:
    """Return the record that a body holds, parsed in a worker thread: a large one would hold up all other requests.

    Raises UnsupportedMediaType, Oversize, InvalidRequest and InvalidRecord.
    """
    media_type = sent_media_type(request)
    raw = await read_body(request, max_bytes=max_bytes)
    return await run_in_threadpool(lambda: parse(model, decode(raw, media_type)))


async def capped(request: Request, *, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body as it arrives. Raises Oversize as soon as it is known to be larger than `max_bytes`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _oversize(int(announced), max_bytes)
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:
            raise _oversize(total, max_bytes)
        yield chunk


def upload_chunks(request: Request, *, max_bytes: int) -> Iterator[bytes]:
    """Yield the body in large chunks, for a worker thread that writes it to disk. Raises Oversize."""
    stream = capped(request, max_bytes=max_bytes)

    async def next_chunk() -> bytes:
        parts: list[bytes] = []
        while sum(map(len, parts)) < _UPLOAD_CHUNK_BYTES:
            part = await anext(stream, None)
            if part is None:
                break
            parts.append(part)
        return b"".join(parts)

    while chunk := anyio.from_thread.run(next_chunk):
        yield chunk


def _oversize(num_bytes: int, max_bytes: int) -> Oversize:
    return Oversize(
        f"the body has {num_bytes} bytes or more, the limit is {max_bytes}",
        hint="send fewer groups at once, or raise the service.max_body_bytes or service.max_blob_bytes setting",
    )


def answer(
    body: BaseModel, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a record as a response. Call it from a worker thread where the record may be large."""
    return Response(encode(body, media_type), status_code=status, headers=headers, media_type=media_type)


def sample_answer(
    num_groups: int, first: list[EncodedSample], rest: Iterator[list[EncodedSample]], media_type: str
) -> Response:
    """Return a SampleResponse of so many groups, streamed chunk by chunk unless the first one is all.

    In msgpack the records go out as they are stored. Call it from a worker thread.
    """
    write = _packed_samples if media_type == MSGPACK else _json_samples
    pieces = write(num_groups, itertools.chain([first], rest))
    if len(first) == num_groups:
        return Response(b"".join(pieces), media_type=media_type)
    return StreamingResponse(pieces, media_type=media_type)


def _packed_samples(num_groups: int, chunks: Iterable[list[EncodedSample]]) -> Iterator[bytes]:
    packer = msgpack.Packer()
    head = packer.pack_map_header(2) + packer.pack("schema") + packer.pack(SCHEMA) + packer.pack("samples")
    yield head + packer.pack_array_header(num_groups)
    group, info = packer.pack_map_header(2) + packer.pack("group"), packer.pack("info")
    for samples in chunks:
        yield b"".join([part for s in samples for part in (group, bare_record(s.record), info, packer.pack(s.info()))])


def _json_samples(num_groups: int, chunks: Iterable[list[EncodedSample]]) -> Iterator[bytes]:
    yield b'{"schema":%d,"samples":[' % SCHEMA
    separator = b""
    for samples in chunks:
        for sample in samples:
            yield separator + encode(sample.decoded(), JSON)
            separator = b","
    yield b"]}"


def install_error_shape(app: FastAPI) -> None:
    """Make every error of the app, the framework's own included, answer in the one shape {error, detail, hint}."""
    app.add_exception_handler(StalewiseError, _on_stalewise_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_defect)


def _problem(
    request: Request, status: int, error: str, detail: str, hint: str, headers: Mapping[str, str] | None = None
) -> Response:
    try:
        media_type = wanted_media_type(request)
    except NotAcceptable:
        media_type = JSON
    return answer(Problem(error=error, detail=detail, hint=hint), media_type, status=status, headers=headers)


async def _on_stalewise_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StalewiseError)
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    return _problem(request, error.status, error.code(), error.detail, error.hint, headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    hint = "see /openapi.json for what the route takes"
    return _problem(request, 422, "invalid_request", f"{where}: {first['msg'].lower()}", hint)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {404: "not_found", 405: "method_not_allowed"}
    detail = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    hint = "see /openapi.json for the routes"
    return _problem(request, error.status_code, kinds.get(error.status_code, "http_error"), detail, hint, error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    log.info("%s %s: the caller hung up while sending", request.method, request.url.path)
    return Response(status_code=400)


async def _on_defect(request: Request, error: Exception) -> Response:
    """A defect of ours: the traceback is logged by the server; the caller learns that it is not its fault."""
    detail = f"{request.method} {request.url.path}: {type(error).__name__} in the service"
    return _problem(request, 500, "internal_error", detail, "this is a defect: see the service's log")
