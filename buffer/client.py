"""What actors, learners and third parties import: the table and the weight store protocols over HTTP."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from buffer.browsing import GroupPage, GroupQuery, GroupSummary
from buffer.connection import ClientSettings, ServiceClient, body_of, error_of
from buffer.errors import CorruptWeights, InvalidRequest, StalewiseError
from buffer.prompts import PromptPage
from buffer.table import PriorityUpdate, SampleRequest, TableStats
from buffer.types import Group, InsertResult, Part, PartResult, PolicyVersion, Sample
from buffer.weights.download import Download
from buffer.weights.manifest import Manifest, Payload
from buffer.wire import (
    JSON,
    MSGPACK,
    InsertRequest,
    InsertResponse,
    PartsRequest,
    PartsResponse,
    StoredGroup,
    TimedSampleRequest,
    encode,
    parse,
    read_samples,
)

__all__ = ["ClientSettings", "HttpTable", "HttpWeightStore", "ServiceClient", "Submission"]

_INSERT_ANSWERS = frozenset({409, 413, 422, 429})


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The answer to submitted groups."""

    results: list[InsertResult]
    retry_after_s: float | None
    """Seconds to pause before submitting again; set when some group was `full`."""


class HttpTable:
    """A ReplayTable behind a replay service."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client

    def submit(self, groups: Sequence[Group]) -> Submission:
        """Insert groups and learn how long to pause; see ReplayTable.insert.

        Groups whose body would be over the service's limit go in several requests.
        """
        if not groups:
            return Submission(results=[], retry_after_s=None)
        return self._submit("/v1/groups", groups)

    def insert(self, groups: Sequence[Group]) -> list[InsertResult]:
        """See ReplayTable."""
        return self.submit(groups).results

    def insert_parts(self, parts: Sequence[Part]) -> list[PartResult]:
        """See ReplayTable; as with groups, a large batch goes in several requests."""
        if not parts:
            return []
        body = encode(PartsRequest(trajectories=list(parts)), MSGPACK)
        if len(parts) > 1 and len(body) > self._max_body_bytes:
            middle = len(parts) // 2
            return [*self.insert_parts(parts[:middle]), *self.insert_parts(parts[middle:])]
        answered, _ = self._post("/v1/trajectories", body)
        return parse(PartsResponse, {"results": answered}).results

    def import_groups(self, groups: Sequence[Group], *, foreign: bool) -> Submission:
        """Insert recorded groups; `foreign` = drawn by other weights than this run's. Needs the role admin."""
        return self._submit(f"/v1/import?foreign={str(foreign).lower()}", groups)

    @cached_property
    def _max_body_bytes(self) -> int:
        return self._client.run_info().limits.max_body_bytes

    def _submit(self, path: str, groups: Sequence[Group]) -> Submission:
        body = encode(InsertRequest(groups=list(groups)), MSGPACK)
        if len(groups) > 1 and len(body) > self._max_body_bytes:
            return self._submit_halves(path, groups)
        answered, retry_after_s = self._post(path, body)
        return Submission(results=parse(InsertResponse, {"results": answered}).results, retry_after_s=retry_after_s)

    def _submit_halves(self, path: str, groups: Sequence[Group]) -> Submission:
        halves = [self._submit(path, half) for half in (groups[: len(groups) // 2], groups[len(groups) // 2 :])]
        pauses_s = [half.retry_after_s for half in halves if half.retry_after_s is not None]
        return Submission(
            results=[result for half in halves for result in half.results], retry_after_s=max(pauses_s, default=None)
        )

    def _post(self, path: str, body: bytes) -> tuple[object, float | None]:
        """Return the results that a submission is answered with, and the pause asked for."""
        response = self._client.request(
            "POST", path, body=body, content_type=MSGPACK, accept=MSGPACK, answers=_INSERT_ANSWERS
        )
        try:
            answered = body_of(response)["results"]
        except (StalewiseError, KeyError, TypeError):  # refused as a whole, or not our service
            raise error_of(response) from None
        pause = response.headers.get("Retry-After")
        return answered, float(pause) if pause else None

    def sample(self, request: SampleRequest, *, timeout_s: float = 0.0) -> list[Sample]:
        """See ReplayTable; the service waits up to `timeout_s` for the draw to become possible."""
        timed = TimedSampleRequest(
            num_groups=request.num_groups,
            learner_version=request.learner_version,
            request_id=request.request_id,
            selector=request.selector,
            timeout_s=timeout_s,
        )
        response = self._client.request(
            "POST",
            "/v1/sample",
            body=encode(timed, MSGPACK),
            content_type=MSGPACK,
            accept=MSGPACK,
            wait_s=timeout_s,
        )
        return read_samples(body_of(response))

    def advance_version(self, version: PolicyVersion) -> None:
        """Check that the service has reached `version`: it advances by itself when weights are published."""
        latest = self._client.run_info().latest_version
        if latest < version:
            raise InvalidRequest(
                f"version {version} is above the latest published one, {latest}",
                hint="publish the weights: a service advances its table by itself",
            )

    def update_priorities(self, priorities: Mapping[str, float]) -> PriorityUpdate:
        """See ReplayTable."""
        body = {"priorities": dict(priorities)}
        response = self._client.request(
            "POST", "/v1/priorities", body=encode(body, MSGPACK), content_type=MSGPACK, accept=MSGPACK
        )
        return parse(PriorityUpdate, body_of(response))

    def prompts(self, cursor: str = "", limit: int = 100) -> PromptPage:
        """See ReplayTable."""
        params = {"cursor": cursor, "limit": str(limit)}
        response = self._client.request("GET", "/v1/prompts", accept=MSGPACK, params=params)
        return parse(PromptPage, body_of(response))

    def get(self, group_id: str) -> Group:
        """See ReplayTable."""
        return self._stored(group_id).group

    def summary(self, group_id: str) -> GroupSummary:
        """See ReplayTable."""
        return self._stored(group_id).summary

    def _stored(self, group_id: str) -> StoredGroup:
        response = self._client.request("GET", f"/v1/groups/{quote(group_id, safe='')}", accept=MSGPACK)
        return parse(StoredGroup, body_of(response))

    def browse(self, query: GroupQuery) -> GroupPage:
        """See ReplayTable."""
        given = query.model_dump(mode="json", exclude_defaults=True)
        params = {name: str(value) for name, value in given.items()}
        return parse(GroupPage, body_of(self._client.request("GET", "/v1/groups", accept=MSGPACK, params=params)))

    def stats(self) -> TableStats:
        """See ReplayTable."""
        return TableStats.model_validate_json(encode(self._client.stats()["table"], JSON))


class HttpWeightStore:
    """A WeightStore behind a replay service."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """See WeightStore. Give chunks that can be iterated again (a list, a file opened in `__iter__`) for retries."""
        self._client.request("PUT", f"/v1/weights/blobs/{sha256}", body=chunks, content_type="application/octet-stream")

    def publish(self, manifest: Manifest) -> None:
        """See WeightStore."""
        self._client.request(
            "PUT", f"/v1/weights/{manifest.version}", body=encode(manifest, MSGPACK), content_type=MSGPACK
        )

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        """See WeightStore: one long poll."""
        params = {"after": str(after), "wait_s": f"{wait_s:g}"}
        response = self._client.request("GET", "/v1/weights/latest", accept=MSGPACK, params=params, wait_s=wait_s)
        return None if response.status_code == 204 else parse(Manifest, body_of(response))

    def manifest(self, version: PolicyVersion) -> Manifest:
        """See WeightStore."""
        response = self._client.request("GET", f"/v1/weights/{version}", accept=MSGPACK)
        return parse(Manifest, body_of(response))

    def blob(self, sha256: str) -> Iterator[bytes]:
        """See WeightStore. The hash is checked at the end: CorruptWeights is raised after the last chunk.

        A connection lost on the way raises httpx.TransportError; `download` is the one that retries.
        """
        digest = hashlib.sha256()
        with self._client.stream(f"/v1/weights/blobs/{sha256}") as chunks:
            for chunk in chunks:
                digest.update(chunk)
                yield chunk
        if digest.hexdigest() != sha256:
            raise CorruptWeights(
                f"blob {sha256} arrived with the hash {digest.hexdigest()}", hint="fetch it again: it was not used"
            )

    def download(self, payload: Payload, path: Path) -> None:
        """See WeightStore: by ranges, several at once, each taken up again where a lost connection broke it off.

        Raises ServiceUnreachable when the retries are spent; another call with the same path goes on from there, in
        another process too, for how far it is stands in a file beside it (buffer.weights.progress). What was taken up
        so is proven by its sha256: CorruptWeights.
        """
        Download(self._client, f"/v1/weights/blobs/{payload.sha256}", payload).to(path)
