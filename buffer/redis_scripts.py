"""The Lua scripts of one table shard and its keys: how they are run, and what their failures mean."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import msgpack
import redis

from buffer.errors import StoreUnavailable

_NAMES = ("insert", "hold", "sample", "advance", "tidy", "browse", "priorities", "pin")


def shard_prefix(run_id: str, shard: int) -> str:
    """Return what all keys of a shard begin with; the braces put them on one node of a cluster."""
    return f"sw:{{{run_id}:{shard}}}:"


VALUE_LIFE_S = 60
"""Seconds for which a value waits for the script that takes it; it follows at once, unless its sender was killed."""


class RedisScripts:
    """Runs scripts on the keys below `prefix`, with the settings and the time that each of them reads."""

    def __init__(
        self, client: redis.Redis, prefix: str, settings: Mapping[str, object], clock: Callable[[], float]
    ) -> None:
        self._client, self._prefix, self._clock = client, prefix, clock
        self._settings: bytes = msgpack.packb(settings)
        self._sources = {name: _script(name) for name in _NAMES}

    def key(self, name: str) -> str:
        """Return the full name of a key of common.lua."""
        return self._prefix + name

    def run(
        self, name: str, calls: Sequence[Sequence[str | bytes]], *, values: Mapping[str, bytes] | None = None
    ) -> list[Any]:
        """Run a script once per call, all in one round trip; load it first where Redis does not know it.

        `values` are set before, for VALUE_LIFE_S: what is large goes past Lua, which would copy it twice.
        """
        if not calls:
            return []
        digest, source = self._sources[name]
        with store_errors():
            pipeline: Any = self._client.pipeline(transaction=False)
            for key, value in (values or {}).items():
                pipeline.set(key, value, ex=VALUE_LIFE_S)
            for call in calls:
                # the method of this name is closed to pipelines on a cluster, although all keys are on one node of it
                pipeline.execute_command("EVALSHA", digest, 1, self._prefix, self._settings, repr(self._clock()), *call)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            for refused in answers[: len(values or {})]:
                if isinstance(refused, Exception):
                    raise refused
            del answers[: len(values or {})]
            unknown = [i for i, answer in enumerate(answers) if isinstance(answer, redis.exceptions.NoScriptError)]
            if unknown:
                self._client.script_load(source)
                for i, answer in zip(unknown, self.run(name, [calls[i] for i in unknown]), strict=True):
                    answers[i] = answer
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers


def _script(name: str) -> tuple[str, str]:
    """Return the SHA-1 and the source of a script; Redis cannot include one file in another, so we join them."""
    folder = files("buffer") / "lua"
    source = "".join((folder / f"{part}.lua").read_text() for part in ("common", "weighting", name, "finish"))
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn what Redis refuses, or that it is away, into StoreUnavailable; errors of our own scripts pass."""
    try:
        yield
    except redis.exceptions.BusyLoadingError as error:
        raise StoreUnavailable("Redis is still loading its data", hint="try again in a moment") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise StoreUnavailable(f"Redis does not answer: {error}", hint="check that it runs, then try again") from error
    except redis.exceptions.ResponseError as error:
        for sign, (detail, hint) in _REFUSALS.items():
            if sign in str(error):
                raise StoreUnavailable(detail, hint=hint) from error
        raise


_REFUSALS = {
    "used memory > 'maxmemory'": ("Redis is out of memory", "raise its maxmemory, or lower table.capacity_bytes"),
    "GONE": ("Redis was away between a group and its insert", "try again"),
    "MISCONF": ("Redis cannot write to its disk", "free disk space, then try again"),
    "READONLY": ("this Redis is a read-only replica", "connect to the primary"),
}
