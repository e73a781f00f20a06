"""What the HTTP face works with: its settings and its collaborators, given once to create_app."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, SecretStr

from buffer.evaluations import Evaluations
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisUrl
from buffer.settings import Settings
from buffer.table import ServedTable, TableSettings
from buffer.weights.store import ServedWeightStore
from buffer.wire import StoreStatus
from services.history import History
from services.presence import Presence
from services.security import TokenSettings
from services.trained_ring import TrainedRing


class ServiceSettings(Settings):
    """Where the service listens, where its Redis is, and what one request may cost."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs tokens."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8642
    """TCP port; 0 takes a free one, which the run's service.json names."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that answer requests, on one port. More than one help when one keeps a core busy and there are others
    for them, one for Redis included; docs/scaling.md has the cost per group."""
    url: str | None = None
    """Where learner, actors and `stats` find the service. None = the run's service.json, else host and port."""
    redis_url: RedisUrl | None = None
    """A Redis of yours, such as redis://redis:6379/0 or rediss://user:password@host:6379. None = the service starts its
    own. A password in it is not shown where settings are."""
    samples_from_redis: bool = False
    """Whether the learner reads its batches from `redis_url` itself: less work for each, but whoever reaches Redis may
    do anything to the run, so only inside a network that you trust. table and limiter must be those of the service."""
    token: SecretStr | None = None
    """The bearer token that this process sends as a client."""
    tokens: TokenSettings = TokenSettings()
    """The bearer tokens that the service knows, by role."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 128 << 20
    """Largest body of a request, payloads of weights apart; twice table.max_group_bytes: room for any group in msgpack.
    In JSON the numbers of a group take two to four times as much."""
    max_blob_bytes: Annotated[int, Field(ge=1024)] = 64 << 30
    """Largest payload of weights; 64 GiB holds a model of 32 B parameters in bfloat16."""
    poll_s: Annotated[float, Field(gt=0)] = 0.02
    """Seconds between two looks on behalf of a request that waits; a bound on the delay that waiting adds."""
    retry_after_s: Annotated[int, Field(ge=1)] = 1
    """Seconds that a `full` answer tells the actor to pause."""
    janitor_tick_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks for overdue groups; what is overdue stays at most so much longer."""
    drain_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds that running requests get to end after SIGTERM; requests that wait end at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceContext:
    """The collaborators of the HTTP face. All state is theirs; the face has none."""

    run_id: str
    settings: ServiceSettings
    table: ServedTable
    table_settings: TableSettings
    limiter_settings: RateLimiterSettings
    weights: ServedWeightStore
    presence: Presence
    history: History
    trained: TrainedRing
    token_texts: Callable[[Sequence[int]], list[str | None]]
    """What token ids read as; None for an unknown one."""
    store: Callable[[], StoreStatus]
    """Asks the stores how much room they have."""
    evaluations: Evaluations
    promises: Callable[[], Mapping[str, str]]
    """What the store guarantees, as it said when the service started: appendfsync, maxmemory_policy."""
    closing: threading.Event = field(default_factory=threading.Event)
    """Set when the service drains: requests that wait answer at once, with nothing."""
    monotonic: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)
    """When this process began to serve, on the clock above."""
