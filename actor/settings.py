"""The actor's section of settings; imports neither torch nor an engine."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from buffer.settings import Settings
from buffer.types import SamplingSettings

EngineName = Literal["torch", "vllm"]


class TaskSettings(Settings):
    """Where prompts and rewards come from."""

    name: str = "running_sums"
    """`running_sums`, or any task of the reasoning-gym package by its name, such as `countdown`."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the task, such as {num_digits = 16} or a reasoning-gym configuration."""


class ActorSettings(Settings):
    """What one actor generates, and how long it bears with an absent service."""

    engine: EngineName = "torch"
    """`torch` samples on one CPU thread; `vllm` needs the environment of constraints-vllm.txt."""
    task: TaskSettings = TaskSettings()
    """Where prompts and rewards come from."""
    sampling: SamplingSettings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    """How tokens are drawn. Temperature 1 without truncation: the policy itself, and no kept ids to ship."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Responses per prompt; the baseline of group advantages needs at least 2."""
    groups_per_batch: Annotated[int, Field(ge=1)] = 16
    """Groups generated side by side; 128 sequences keep one core busy with a tiny model."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens per response at most, end token included."""
    spool_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Disk for groups finished while the service is away; generation pauses when it is full. 0 = no spool."""
    poll_s: Annotated[float, Field(gt=0)] = 20.0
    """Length of one long poll for new weights, in seconds; below the usual proxy timeout of 30 s."""
    retry_s: Annotated[float, Field(gt=0)] = 0.5
    """First pause after a refusal or a lost connection, in seconds; doubled up to 16 times this, with jitter."""
    connect_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for the service at start before giving up; covers a compose file that starts all at once."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between heartbeats; the dashboard's resolution."""
    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds of waiting after which the log warns, and again each time as long."""
