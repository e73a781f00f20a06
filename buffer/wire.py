"""The bodies of the HTTP surface and their two encodings, shared by the service and its clients.

One schema, two encodings: in JSON arrays are lists, in msgpack they are raw little-endian bytes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgpack
import pydantic_core
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from buffer.browsing import GroupSummary
from buffer.codec import TOO_MANY_CONTAINERS, intact_group_from_record, most_containers, sentence, unpack
from buffer.errors import InvalidRecord, InvalidRequest
from buffer.evaluations import EvaluationBoard
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import SampleRequest, TableStats, Wait
from buffer.trained import MAX_TRAINED_GROUPS, TrainedGroup
from buffer.types import (
    MAX_ITEMS,
    SCHEMA,
    Group,
    Identifier,
    InsertResult,
    LimiterState,
    Part,
    PartResult,
    PolicyVersion,
    Record,
    Sample,
    SampleInfo,
)
from buffer.weights.store import WeightsStatus

JSON = "application/json"
MSGPACK = "application/msgpack"
JSON_LINES = "application/jsonl"

_HARMLESS_BYTES = 1 << 16
"""JSON of that size may hold what it likes: brackets stand in texts, too, and are counted unread."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
"""An integer that every encoding and language carries exactly."""
SchemaNumber = Annotated[Literal[1], Field(alias="schema", description="The record layout; always 1.")]


class Envelope(Record, Generic[T]):
    """Submitted groups, not yet judged one by one."""

    schema_number: SchemaNumber = SCHEMA
    groups: Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS)]


class InsertRequest(Envelope[Group]):
    """The body of POST /v1/groups."""


class PartsEnvelope(Record, Generic[T]):
    """Submitted parts of groups, not yet judged one by one."""

    schema_number: SchemaNumber = SCHEMA
    trajectories: Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS)]


class PartsRequest(PartsEnvelope[Part]):
    """The body of POST /v1/trajectories."""


class InsertResponse(Record):
    """One result per submitted group, in the order submitted."""

    results: list[InsertResult]


class Problem(Record):
    """The one error shape."""

    error: str
    """Name of the kind of error, in snake case."""
    detail: str
    """What is wrong, with the value seen."""
    hint: str
    """What to do about it; may be empty."""


class InsertRefused(Problem):
    """No group was stored; one result per group says why."""

    results: list[InsertResult]


class PartsResponse(Record):
    """One result per submitted part, in the order submitted."""

    results: list[PartResult]


class PartsRefused(Problem):
    """No part was taken; one result per part says why."""

    results: list[PartResult]


class StoredGroup(Record):
    """The answer of GET /v1/groups/{group_id}."""

    summary: GroupSummary
    group: Group


class TimedSampleRequest(SampleRequest):
    """The body of POST /v1/sample: a draw and how long it may wait to become possible."""

    timeout_s: Annotated[float, Field(ge=0, le=300)] = 0.0


class SampleResponse(Record):
    """Drawn groups; none when the draw did not become possible in time."""

    schema_number: SchemaNumber = SCHEMA
    samples: list[Sample]


class PriorityRequest(Record):
    """The body of POST /v1/priorities."""

    schema_number: SchemaNumber = SCHEMA
    priorities: Annotated[dict[Identifier, float], Field(max_length=MAX_ITEMS)]
    """group_id -> priority in [0, 1e18]; ids that are not stored are ignored and counted."""


class Limits(Record):
    """What a submission must stay under."""

    max_body_bytes: int
    max_group_bytes: int
    capacity_groups: int
    capacity_bytes: int


class RunInfo(Record):
    """The answer of GET /v1/run: whom a caller is talking to."""

    run_id: Identifier
    schema_number: SchemaNumber = SCHEMA
    model_fingerprint: str | None
    """Fingerprint of the published model (buffer.fingerprint); null before the first version."""
    latest_version: PolicyVersion
    """-1 before the first."""
    limits: Limits
    tokens_required: bool


class Load(Record):
    """A version that an actor has loaded and proven by its canary."""

    version: Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
    publish_to_loaded_s: Annotated[FiniteFloat, Field(ge=0)]
    """From the learner's time stamp in the manifest to the canary's verdict here; as right as the two clocks are."""


class Heartbeat(Record):
    """An actor is alive: the body of POST /v1/actors/{actor_id}/heartbeat."""

    version: Annotated[PolicyVersion, Field(ge=-1, lt=1 << 53)]
    """Weights in use; -1 before the first load."""
    tokens_per_s: Annotated[FiniteFloat, Field(ge=0)]
    """Response tokens drawn per second of late."""
    groups_total: Count
    """Groups submitted and answered since the actor started."""
    unscored_groups_total: Count = 0
    """Groups dropped since it started because the task gave no reward."""
    state: Annotated[str, Field(max_length=64)]
    """One word: generating, waiting, quarantined ..."""
    detail: Annotated[str, Field(max_length=1024)] = ""
    """A sentence about the state, such as what it waits for."""
    loads: Annotated[tuple[Load, ...], Field(max_length=16, strict=False)] = ()
    """The last versions loaded, oldest first."""


class ActorStatus(Heartbeat):
    """An actor's last heartbeat."""

    actor_id: Identifier
    age_s: float
    """Seconds since the heartbeat arrived."""


class LearnerProgress(Record):
    """How the learner is doing."""

    updates: Count
    total_updates: Annotated[int, Field(ge=1)] | None = None
    """Updates after which the learner is done; null when it has no end."""
    version: Annotated[PolicyVersion, Field(ge=-1, lt=1 << 53)]
    """The learner's update clock, against which ages are measured."""
    metrics: dict[str, FiniteFloat]
    waiting: Wait | None = None
    """For whom the learner waits, if it does."""


class LearnerReport(LearnerProgress):
    """The body of POST /v1/learner/metrics."""

    trained: Annotated[tuple[TrainedGroup, ...], Field(max_length=MAX_TRAINED_GROUPS, strict=False)] = ()
    """Groups of the last update with their ratios; the service remembers the newest ones."""


class LearnerStatus(LearnerProgress):
    """The learner's last report."""

    age_s: float
    """Seconds since the report arrived."""


class LimiterStatus(Record):
    """Who may move, and under which settings."""

    state: Annotated[LimiterState, Field(strict=False)]
    settings: RateLimiterSettings


class StoreStatus(Record):
    """How near the stores are to their limits."""

    memory_bytes: int
    """What Redis uses, all runs in it."""
    memory_limit_bytes: int
    """Redis' maxmemory; 0 = none but the machine's."""
    disk_free_bytes: int
    """Where the run's directory is."""
    disk_total_bytes: int


class ServiceStats(Record):
    """The answer of GET /v1/stats."""

    run: RunInfo
    table: TableStats
    limiter: LimiterStatus
    weights: WeightsStatus
    learner: LearnerStatus | None
    actors: list[ActorStatus]
    store: StoreStatus
    evaluations: EvaluationBoard
    promises: dict[str, str]
    """What the store guarantees, as it said when the service started: appendfsync, maxmemory_policy."""
    uptime_s: float
    """Seconds since this service process started."""


def encode(body: BaseModel | Mapping[str, Any], media_type: str) -> bytes:
    """Return a body in one of the two encodings."""
    if media_type == MSGPACK:
        plain = body.model_dump(by_alias=True) if isinstance(body, BaseModel) else body
        packed: bytes = msgpack.packb(plain)
        return packed
    return pydantic_core.to_json(body, by_alias=True)


def decode(raw: bytes, media_type: str) -> Any:
    """Return the plain value of a body. Raises InvalidRecord or InvalidRequest; NaN and Infinity are not JSON."""
    if media_type == MSGPACK:
        return unpack(raw, max_bytes=len(raw))
    if len(raw) > _HARMLESS_BYTES and raw.count(b"[") + raw.count(b"{") > most_containers(len(raw)):
        raise InvalidRequest(f"the body has {TOO_MANY_CONTAINERS}")
    try:
        return pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        hint = "NaN and Infinity are not JSON" if b"NaN" in raw or b"Infinity" in raw else ""
        raise InvalidRequest(f"the body is not {media_type}: {error or type(error).__name__}", hint=hint) from error


def read_samples(value: object) -> list[Sample]:
    """Read a decoded SampleResponse of our own service, whose groups a table has validated. Raises InvalidRequest."""
    match value:
        case {"schema": 1, "samples": [*plain_samples], **rest} if not rest:
            try:
                return [
                    Sample(group=intact_group_from_record(plain["group"]), info=SampleInfo(**plain["info"]))
                    for plain in plain_samples
                ]
            except (KeyError, TypeError, ValidationError, InvalidRecord):
                pass  # pydantic finds the words
    return parse(SampleResponse, value).samples


def parse(model: type[M], value: object) -> M:
    """Validate a decoded body. Raises InvalidRequest with one sentence that names the field."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is a {type(value).__name__}, not a map of fields")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(sentence(value, error)) from error
