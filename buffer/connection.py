"""The replay service as actors, learners and third parties see it: one connection, with retries inside a budget."""

import http.client
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import Field

from buffer import errors
from buffer.errors import DrawLost, InvalidSettings, ServiceUnreachable, StalewiseError, StoreUnavailable
from buffer.request_id import HEADER, current_request_id, request_scope
from buffer.settings import Settings
from buffer.wire import JSON, MSGPACK, Heartbeat, LearnerReport, RunInfo, decode, encode, parse

log = logging.getLogger(__name__)

_ERRORS = {
    kind.code(): kind
    for kind in (
        errors.InvalidRecord,
        errors.InvalidRequest,
        errors.Oversize,
        errors.UnsupportedMediaType,
        errors.NotAcceptable,
        errors.Unauthorized,
        errors.Forbidden,
        errors.NotFound,
        errors.Conflict,
        errors.StoreUnavailable,
        errors.DrawLost,
        errors.CorruptWeights,
        errors.RunMismatch,
    )
}
R = TypeVar("R")
_MAX_PROBLEM_BYTES = 1 << 16


class ClientSettings(Settings):
    """How long a caller bears with a slow or absent service."""

    connect_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to open a connection; a loopback or data-centre service answers in milliseconds."""
    read_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte before a request counts as lost; long polls add their own wait."""
    download_connections: Annotated[int, Field(ge=1, le=64)] = 4
    """Connections that fetch a large payload side by side; one carries some 2 GB/s on loopback, far less over a WAN."""
    retry_budget_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds of retrying before ServiceUnreachable; covers a restart of the service. 0 = never retry."""
    retry_first_s: Annotated[float, Field(gt=0)] = 0.1
    """First pause between attempts; doubled each time, with jitter, so that many actors do not return at once."""
    retry_max_s: Annotated[float, Field(gt=0)] = 5.0
    """Longest pause between attempts."""
    ca_file: Path | None = None
    """Certificates (PEM) of the authorities to trust for an https:// service, in place of the usual ones: for a private
    authority, or a self-signed certificate. null = those of the certifi package."""


class ServiceClient:
    """A connection to one replay service; threads may share it.

    Every request is safe to repeat, so a lost answer, a proxy's error or StoreUnavailable is retried until the budget
    is spent; then ServiceUnreachable or StoreUnavailable is raised (DrawLost at once). `stopping` ends the pauses
    between attempts: a last attempt follows at once. Raises InvalidSettings where settings.ca_file has no certificates.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        settings: ClientSettings | None = None,
        stopping: threading.Event | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: random.Random | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.retries_total = 0
        """Attempts beyond the first of each request, since construction."""
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.settings = settings or ClientSettings()
        """As given."""
        self._stopping = stopping or threading.Event()
        self._monotonic = monotonic
        self._jitter = jitter or random.Random()
        self._tls = _tls(self.settings.ca_file)
        self._http = httpx.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(self.settings.read_timeout_s, connect=self.settings.connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            verify=self._tls,
            trust_env=False,
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def run_info(self) -> RunInfo:
        """Return whom we are talking to."""
        return parse(RunInfo, self.get_json("/v1/run"))

    def stats(self) -> dict[str, Any]:
        """Return the answer of GET /v1/stats (buffer.wire.ServiceStats) as plain values."""
        stats: dict[str, Any] = self.get_json("/v1/stats")
        return stats

    def heartbeat(self, actor_id: str, heartbeat: Heartbeat) -> None:
        """Say that an actor is alive. An actor calls it every few seconds."""
        self.request("POST", f"/v1/actors/{quote(actor_id, safe='')}/heartbeat", body=encode(heartbeat, JSON))

    def post_learner_metrics(self, report: LearnerReport) -> None:
        """Post the learner's progress; the dashboard shows the last one."""
        self.request("POST", "/v1/learner/metrics", body=encode(report, MSGPACK), content_type=MSGPACK)

    def get_json(self, path: str) -> Any:
        """GET a path and return its decoded JSON."""
        return decode(self.request("GET", path, accept=JSON).content, JSON)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Iterable[bytes] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
        params: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        answers: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """Send a request, with retries, and return a success or a status in `answers`; raise the named error otherwise.

        `wait_s` is how long the service may think on purpose; it is added to the read timeout. An iterable body is
        iterated anew for each attempt, so a one-shot iterator cannot be retried. All attempts carry one request id.
        """
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})
        timeout = httpx.Timeout(self.settings.read_timeout_s + wait_s, connect=self.settings.connect_timeout_s)

        def attempt() -> httpx.Response:
            named = {**headers, HEADER: current_request_id()}
            response = self._http.request(method, path, content=body, headers=named, params=params, timeout=timeout)
            if not response.is_success and response.status_code not in answers:
                log.info("%s %s is answered with %d", method, path, response.status_code)
                raise error_of(response)
            return response

        return self.retry(attempt, what=f"{method} {path}")

    def raw_connection(self) -> http.client.HTTPConnection:
        """Return a new connection for bodies that are received straight into memory: see `raw_get`."""
        url = httpx.URL(self.url)
        timeout_s = self.settings.read_timeout_s
        if url.scheme == "https":
            return http.client.HTTPSConnection(url.host, url.port, timeout=timeout_s, context=self._tls)
        return http.client.HTTPConnection(url.host, url.port, timeout=timeout_s)

    def raw_get(
        self, connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        """Send a GET without retries and return a success with its body unread; raise the named error otherwise."""
        url = httpx.URL(self.url + path)
        connection.request("GET", url.raw_path.decode(), headers={**self._headers, **headers, "Accept": "*/*"})
        response = connection.getresponse()
        if response.status >= HTTPStatus.BAD_REQUEST:
            answered = httpx.Response(
                response.status,
                headers=response.getheaders(),
                content=response.read(_MAX_PROBLEM_BYTES),
                request=httpx.Request("GET", url),
            )
            raise error_of(answered)
        return response

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """GET a path and hand out its body in chunks, without retries: a caller repeats it by `retry`."""
        with (
            request_scope() as request_id,
            self._http.stream("GET", path, headers={"Accept": "*/*", HEADER: request_id}) as response,
        ):
            if not response.is_success:
                response.read()
                raise error_of(response)
            yield response.iter_bytes(1 << 20)

    def retry(self, attempt: Callable[[], R], *, what: str) -> R:
        """Call `attempt`, under one request id, until it succeeds, an error is named or the budget is spent."""
        with request_scope():
            return self._retry(attempt, what)

    def _retry(self, attempt: Callable[[], R], what: str) -> R:
        deadline = self._monotonic() + self.settings.retry_budget_s
        pause_s = self.settings.retry_first_s
        is_last = False
        while True:
            try:
                return attempt()
            except DrawLost:
                raise  # for good
            except (ServiceUnreachable, StoreUnavailable) as error:
                problem: StalewiseError = error
            except httpx.TransportError as error:
                problem = ServiceUnreachable(
                    f"no answer from {self.url} to {what}: {error or type(error).__name__}",
                    hint="check that the service runs and that service.url is right",
                )
            delay_s = pause_s * self._jitter.uniform(0.5, 1.0)
            if is_last or self._monotonic() + delay_s > deadline:
                raise problem
            is_last = self._stopping.wait(delay_s)
            if pause_s == self.settings.retry_first_s:
                log.warning("%s; retrying for up to %g s", problem, self.settings.retry_budget_s)
            self.retries_total += 1
            pause_s = min(2 * pause_s, self.settings.retry_max_s)


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    if ca_file is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InvalidSettings(
            f"client.ca_file={ca_file} cannot be used: {error}", hint="give a file of certificates in PEM"
        ) from error


def body_of(response: httpx.Response) -> Any:
    """Return the decoded body of a response, in the encoding that it names."""
    media_type = response.headers.get("content-type", "").partition(";")[0]
    return decode(response.content, MSGPACK if media_type == MSGPACK else JSON)


def error_of(response: httpx.Response) -> StalewiseError:
    """Return the error that a response names; ServiceUnreachable when something else than our service answered."""
    try:
        body = body_of(response)
        kind, detail, hint = body["error"], str(body["detail"]), str(body["hint"])
    except (StalewiseError, KeyError, TypeError):
        return ServiceUnreachable(
            f"{response.request.url} answered {response.status_code} without naming an error",
            hint="check that service.url points at a Stalewise service",
        )
    return named_error(kind, detail, hint=hint)


def named_error(code: str, detail: str, *, hint: str) -> StalewiseError:
    """Return the error of a code that travelled; a plain StalewiseError for one that is not meant for clients."""
    return _ERRORS.get(code, StalewiseError)(detail, hint=hint)
