"""One error tree. Each child knows the HTTP status it travels under; each message says what to do."""

import re
from http import HTTPStatus


class StalewiseError(Exception):
    """Base of every error a user can meet.

    `hint` says what to do about it; it travels in the one error shape `{error, detail, hint}`, where
    `error` is the class name in snake case.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code = 1

    def __init__(self, detail: str, *, hint: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    @classmethod
    def code(cls) -> str:
        """Return the name that travels as `error`: the class name in snake case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


class InvalidSettings(StalewiseError, ValueError):
    """A setting is unknown, malformed or impossible together with another one."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    exit_code = 2


class InvalidRecord(StalewiseError, ValueError):
    """A submitted group breaks the contract of `buffer.types`."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class InvalidRequest(StalewiseError, ValueError):
    """A request is malformed or asks for something that can never be given."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class Oversize(StalewiseError):
    """A body or a record is larger than the stated limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedMediaType(StalewiseError):
    """A body is in an encoding that the service does not read."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class NotAcceptable(StalewiseError):
    """The caller accepts none of the encodings that the service writes."""

    status = HTTPStatus.NOT_ACCEPTABLE


class Unauthorized(StalewiseError):
    """A token is missing or unknown."""

    status = HTTPStatus.UNAUTHORIZED


class Forbidden(StalewiseError):
    """The token is known, its role may not use this route."""

    status = HTTPStatus.FORBIDDEN


class NotFound(StalewiseError):
    """No such group, version or blob."""

    status = HTTPStatus.NOT_FOUND


class RangeNotSatisfiable(StalewiseError):
    """A byte range lies outside the payload."""

    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


class Conflict(StalewiseError):
    """The same id was used before with other content, or a version would be published twice."""

    status = HTTPStatus.CONFLICT


class StoreUnavailable(StalewiseError):
    """Redis or the disk refuses or cannot be reached; nothing was stored."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    exit_code = 3


class DrawLost(StoreUnavailable):
    """Groups of a draw were removed and are no longer kept for its reader: only a new draw can go on."""

    status = HTTPStatus.GONE


class ServiceUnreachable(StalewiseError):
    """The replay service did not answer within the retry budget."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    exit_code = 3


class EngineUnreachable(StalewiseError):
    """The server that an actor generates with does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    exit_code = 3


class CorruptWeights(StalewiseError):
    """A payload does not have the hash that names it, is malformed, or does not lead to the weights it names."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class WrongBase(StalewiseError):
    """A weight delta starts from other weights than the ones at hand."""

    status = HTTPStatus.CONFLICT


class CanaryFailed(StalewiseError):
    """An engine loaded weights but scores the probe differently from the learner: the load is wrong."""

    status = HTTPStatus.BAD_GATEWAY


class RunMismatch(StalewiseError):
    """The run, model or tokenizer of the caller is not the one this service serves."""

    status = HTTPStatus.CONFLICT
    exit_code = 2
