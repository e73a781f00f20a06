"""The id of the request that is being served or sent: one id through all hops, in the header and in every log line."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HEADER = "X-Request-Id"

_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_current: ContextVar[str] = ContextVar("current_request_id", default="")


def current_request_id() -> str:
    """Return the id of the request at hand; empty when there is none."""
    return _current.get()


@contextmanager
def request_scope(given: str = "") -> Iterator[str]:
    """Work under an id: `given`, else the one of the request at hand, else a new one.

    A given id that should not stand in a log (too long, or with other characters than [A-Za-z0-9._:-]) is replaced.
    """
    request_id = given or _current.get()
    if not _PATTERN.fullmatch(request_id):
        request_id = uuid.uuid4().hex
    token = _current.set(request_id)
    try:
        yield request_id
    finally:
        _current.reset(token)
