"""The Lua scripts of one table shard and its keys: how they are run, and what their failures mean."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import msgpack
import redis

from buffer.redis_client import RedisClient, store_errors

_NAMES = ("insert", "hold", "sample", "advance", "tidy", "browse", "priorities", "pin")


def shard_prefix(run_id: str, shard: int) -> str:
    """Return what all keys of a shard begin with; the braces put them on one node of a cluster."""
    return f"sw:{{{run_id}:{shard}}}:"


VALUE_LIFE_S = 60
"""Seconds for which a value waits for the script that takes it; it follows at once, unless its sender was killed."""


class RedisScripts:
    """Runs scripts on the keys below `prefix`, with the settings and the time that each of them reads."""

    def __init__(
        self, client: RedisClient, prefix: str, settings: Mapping[str, object], clock: Callable[[], float]
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
            answers = self._execute([("EVALSHA", digest, call) for call in calls], values or {})
            unknown = [i for i, answer in enumerate(answers) if isinstance(answer, redis.exceptions.NoScriptError)]
            if unknown:  # the first one carries the script to the node that lacks it: other nodes may be away
                first, *others = [calls[i] for i in unknown]
                again = self._execute([("EVAL", source, first), *(("EVALSHA", digest, call) for call in others)], {})
                for i, answer in zip(unknown, again, strict=True):
                    answers[i] = answer
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers

    def _execute(
        self, commands: Sequence[tuple[str, str, Sequence[str | bytes]]], values: Mapping[str, bytes]
    ) -> list[Any]:
        """Set the values, run {command, script or its digest, arguments}: one round trip, answers or errors of each."""
        pipeline: Any = self._client.pipeline(transaction=False)
        for key, value in values.items():
            pipeline.execute_command("SET", key, value, "EX", VALUE_LIFE_S)  # `set` takes eight times as long to say it
        for command, script, arguments in commands:
            # the methods of these names are closed to pipelines on a cluster, although all keys are on one node of it
            pipeline.execute_command(command, script, 1, self._prefix, self._settings, repr(self._clock()), *arguments)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        for refused in answers[: len(values)]:
            if isinstance(refused, Exception):
                raise refused
        return answers[len(values) :]


def _script(name: str) -> tuple[str, str]:
    """Return the SHA-1 and the source of a script; Redis cannot include one file in another, so we join them."""
    folder = files("buffer") / "lua"
    source = "".join((folder / f"{part}.lua").read_text() for part in ("common", "weighting", name, "finish"))
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source
