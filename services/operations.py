"""An operation of the HTTP surface: its endpoint, who may use it, and its true entry in OpenAPI."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from buffer.wire import JSON, MSGPACK, Problem
from services.security import ACCESS, Guard

OCTETS = "application/octet-stream"
_REFERENCE = "#/components/schemas/{model}"
_BINARY = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    route: str
    """`METHOD /path`, as in security.ACCESS."""
    endpoint: Callable[..., Awaitable[Response]]
    body: type[BaseModel] | bytes | None = None
    """The record that the body holds; b"" for raw bytes."""
    answers: Mapping[int, type[BaseModel] | bytes | tuple[str, ...] | None]
    """Status of success -> record, b"" for raw bytes, the media types of a text, None for no body."""
    refusals: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    """Status of an error -> its record, where that is more than a Problem; or a Problem, for a status in both."""
    problems: Sequence[int] = ()
    """Statuses of errors that answer a Problem."""


def register(app: FastAPI, operations: Sequence[Operation], guard: Guard) -> None:
    """Add the operations to the app, each behind the guard, and describe them in its OpenAPI."""
    for operation in operations:
        method, path = operation.route.split(" ", 1)
        app.add_api_route(
            path,
            operation.endpoint,
            methods=[method],
            dependencies=[Depends(_gate(operation.route, guard))],
            response_model=None,
            response_class=Response,
            status_code=min(operation.answers),  # else FastAPI adds a 200
            responses=_responses(operation),
            openapi_extra=_extra(operation),
            summary=(operation.endpoint.__doc__ or "").partition("\n")[0],
        )
    generate = app.openapi

    def described() -> dict[str, Any]:
        schema = generate()
        components = schema.setdefault("components", {})
        components["schemas"] = _schemas(operations)
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _gate(route: str, guard: Guard) -> Callable[[Request], Awaitable[None]]:
    assert route in ACCESS, f"{route} has no row in security.ACCESS"

    async def gate(request: Request) -> None:
        guard.check(route, request.headers.get("authorization"))

    return gate


def _responses(operation: Operation) -> dict[int | str, dict[str, Any]]:
    guarded = (401, 403) if ACCESS[operation.route] is not None else ()
    contents: dict[int, dict[str, Any]] = {status: _content(body) for status, body in operation.answers.items()}
    unmatched = (404,) if "{" in operation.route else ()  # no route takes a line feed or, without :path, a slash there
    contents |= {status: _content(Problem) for status in (*operation.problems, *guarded, *unmatched, 500)}
    for status, body in operation.refusals.items():
        contents[status] = _either(body, Problem) if status in operation.problems else _content(body)
    return {status: {"description": HTTPStatus(status).phrase, **content} for status, content in contents.items()}


def _extra(operation: Operation) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if operation.body is not None:
        extra["requestBody"] = {"required": True, **_content(operation.body)}
    if ACCESS[operation.route] is not None:
        extra["security"] = [{}, {"token": []}]
    return extra


def _content(body: type[BaseModel] | bytes | tuple[str, ...] | None) -> dict[str, Any]:
    if body is None:
        return {}
    if isinstance(body, bytes):
        return {"content": _BINARY}
    if isinstance(body, tuple):
        return {"content": {media_type: {"schema": {"type": "string"}} for media_type in body}}
    schema = {"schema": {"$ref": _REFERENCE.format(model=body.__name__)}}
    return {"content": {JSON: schema, MSGPACK: schema}}


def _either(*models: type[BaseModel]) -> dict[str, Any]:
    schema = {"schema": {"anyOf": [{"$ref": _REFERENCE.format(model=model.__name__)} for model in models]}}
    return {"content": {JSON: schema, MSGPACK: schema}}


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    models: set[type[BaseModel]] = {Problem}
    for operation in operations:
        for body in (operation.body, *operation.answers.values(), *operation.refusals.values()):
            if body is not None and not isinstance(body, bytes | tuple):
                models.add(body)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schema = models_json_schema([(model, "validation") for model in ordered], ref_template=_REFERENCE)
    definitions: dict[str, Any] = schema["$defs"]
    return definitions
