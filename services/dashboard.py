"""The page with the live numbers: files of this package, served as they are; the page polls /v1/stats."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated

from fastapi import Path, Response

from buffer.errors import NotFound
from services.operations import Operation

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "txt": "text/plain"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_operations() -> Sequence[Operation]:
    """Return the operations that serve the page."""
    contents = {entry.name: entry.read_text(encoding="utf-8") for entry in (files("services") / "static").iterdir()}

    async def page() -> Response:
        """Return the page."""
        return _file(contents, "index.html")

    async def static_file(name: Annotated[str, Path(pattern=r"^[a-z]+(\.[a-z]+)+$")]) -> Response:
        """Return a file of the page."""
        return _file(contents, name)

    return (
        Operation(route="GET /", endpoint=page, answers={200: ("text/html",)}),
        Operation(
            route="GET /static/{name}",
            endpoint=static_file,
            answers={200: tuple(_MEDIA_TYPES.values())},
            problems=(404, 422),
        ),
    )


def _file(contents: dict[str, str], name: str) -> Response:
    if name not in contents:
        raise NotFound(f"the page has no file {name}")
    return Response(contents[name], media_type=_MEDIA_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
