"""What the HTTP face works with: collaborators and limits, given once to create_app."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from buffer.rate_limiter import RateLimiterSettings
from buffer.settings import Settings
from buffer.table import ReplayTable, TableSettings
from buffer.weights.directory_store import DirectoryWeightStore
from services.presence import Presence


class HttpLimits(Settings):
    """What one request may cost."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 128 << 20
    """Largest body of a request, payloads of weights apart; twice table.max_group_bytes, so that any group fits."""
    max_blob_bytes: Annotated[int, Field(ge=1024)] = 64 << 30
    """Largest payload of weights; 64 GiB holds a model of 32 B parameters in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceContext:
    """The collaborators of the HTTP face. All state is theirs; the face has none."""

    run_id: str
    table: ReplayTable
    weights: DirectoryWeightStore
    presence: Presence
    table_settings: TableSettings
    limiter_settings: RateLimiterSettings
    limits: HttpLimits
    promises: Callable[[], Mapping[str, str]]
    """Asks the store what it guarantees now: appendfsync, maxmemory_policy."""
    poll_s: float = 0.02
    """Seconds between two looks on behalf of a request that waits."""
    retry_after_s: int = 1
    """What a refused actor is told to wait."""
    closing: threading.Event = field(default_factory=threading.Event)
    """Set when the service drains: requests that wait answer at once, with nothing."""
    monotonic: Callable[[], float] = time.monotonic
