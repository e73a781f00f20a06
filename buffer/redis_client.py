"""Connections to Redis, one server or a cluster, and what the live servers promise."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import redis
from pydantic import PlainSerializer
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry

from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.redis_server import RedisSettings

RedisClient = redis.Redis | redis.RedisCluster

_FSYNC = ("always", "everysec", "no")  # the strongest promise first
_CLUSTER = {"redis-cluster": "redis", "rediss-cluster": "rediss"}
"""Scheme of a cluster -> scheme of each of its nodes."""
_REFUSALS = {
    "used memory > 'maxmemory'": ("Redis is out of memory", "raise its maxmemory, or lower table.capacity_bytes"),
    "GONE": ("Redis was away between a group and its insert", "try again"),
    "MISCONF": ("Redis cannot write to its disk", "free disk space, then try again"),
    "read only replica": ("this Redis is a read-only replica", "connect to the primary"),
    "NOREPLICAS": ("Redis has too few replicas to write", "bring its replicas back, or lower min-replicas-to-write"),
    "BUSY Redis is busy": ("Redis is busy with a script", "try again in a moment"),
}
"""What stands in an error of Redis, or of a script that met it -> what that means, and what to do."""


def without_password(url: str) -> str:
    """Return a URL that may be shown."""
    return re.sub(r"([?&]password=)[^&]*", r"\1***", re.sub(r"(//[^:@/]*:)[^@]*@", r"\1***@", url))


RedisUrl = Annotated[str, PlainSerializer(without_password, when_used="json")]
"""A URL whose password stays out of what is printed and written: both are JSON."""


def connect(url: str) -> RedisClient:
    """Return a client whose calls fail within seconds, not minutes, while Redis is away.

    `redis-cluster://host:port,host:port` names nodes of a cluster; the others are found through any of them. Raises
    InvalidSettings, and StoreUnavailable when no node of a cluster answers.
    """
    patience: dict[str, Any] = {"socket_timeout": 30.0, "socket_connect_timeout": 5.0}
    parts = urlsplit(url)
    try:
        if parts.scheme in _CLUSTER:
            return _connect_cluster(url, patience)
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3)
        return redis.Redis.from_url(url, retry=retry, **patience)
    except ValueError as error:
        shown = without_password(url)
        why = f": {error}" if shown == url else ""  # the error may have a part of the password in it
        hint = "for example redis://127.0.0.1:6379/0; /, ? and # of a password are written as %2F, %3F and %23"
        raise InvalidSettings(f"redis url {shown!r} cannot be read{why}", hint=hint) from None


def _connect_cluster(url: str, patience: dict[str, Any]) -> redis.RedisCluster:
    parts = urlsplit(url)
    login, _, addresses = parts.netloc.rpartition("@")
    first, *others = addresses.split(",")
    hosts = [urlsplit(f"//{other}") for other in others]
    make_node: Any = ClusterNode  # redis-py has no types for it
    nodes = [make_node(host.hostname or "", host.port or 6379) for host in hosts]
    node_url = urlunsplit(parts._replace(scheme=_CLUSTER[parts.scheme], netloc=f"{login}@{first}" if login else first))
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3)
    with store_errors():
        return redis.RedisCluster(
            url=node_url,
            startup_nodes=nodes,
            require_full_coverage=False,  # a missing node is the trouble of its shards alone
            retry=retry,
            **patience,
        )


def nodes_of(client: RedisClient) -> dict[str, redis.Redis]:
    """Return the primaries that a client talks to, by address; a server that is no cluster is the only one."""
    if isinstance(client, redis.Redis):
        return {"Redis": client}
    cluster: Any = client  # redis-py has no types for these two methods
    return {node.name: cluster.get_redis_connection(node) for node in cluster.get_primaries()}


def check_promises(client: RedisClient, settings: RedisSettings) -> dict[str, str]:
    """Return what the live servers promise: {appendonly, appendfsync, maxmemory_policy}; of a cluster, each node.

    A server that hides its configuration gives `unknown`. Raises InvalidSettings when one promises less than `settings`
    say, StoreUnavailable when it does not answer.
    """
    promises: dict[str, str] = {}
    wanted = {
        "appendonly": ("yes",),
        "appendfsync": _FSYNC[: _FSYNC.index(settings.appendfsync) + 1],
        "maxmemory_policy": ("noeviction",),
    }
    for address, node in nodes_of(client).items():
        for name, allowed in wanted.items():
            option = name.replace("_", "-")
            promise = read_option(node, option)
            if option == "maxmemory-policy" and promise == "unknown":
                promise = _told_policy(node)
            if promise not in (*allowed, "unknown"):
                raise InvalidSettings(
                    f"{address} runs with {option}={promise}, but this run needs {' or '.join(allowed)}",
                    hint="change the configuration of Redis, or redis.appendfsync of this run",
                )
            promises[name] = max(promises.get(name, promise), promise, key=lambda text: (text == "unknown", text))
    return promises


def read_option(node: redis.Redis, name: str) -> str:
    """Return an option of a live server; `unknown` where it hides its configuration. Raises StoreUnavailable."""
    try:
        values: Any = node.config_get(name)
    except redis.exceptions.ResponseError:  # managed servers forbid CONFIG
        return "unknown"
    except redis.exceptions.RedisError as error:
        raise StoreUnavailable(f"Redis does not answer: {error}", hint="check the url and that it runs") from error
    return str(values.get(name, "unknown"))


def _told_policy(node: redis.Redis) -> str:
    """Return the eviction policy by INFO, which most servers allow that hide their configuration."""
    with store_errors():
        memory: Any = node.info("memory")
    return str(memory.get("maxmemory_policy", "unknown"))


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn what Redis refuses, or that it is away, into StoreUnavailable; errors of our own scripts pass."""
    try:
        yield
    except redis.exceptions.BusyLoadingError as error:
        raise StoreUnavailable("Redis is still loading its data", hint="try again in a moment") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise StoreUnavailable(f"Redis does not answer: {error}", hint="check that it runs, then try again") from error
    except (redis.exceptions.ClusterError, redis.exceptions.RedisClusterException) as error:  # a slot is not served
        raise StoreUnavailable(
            f"the Redis Cluster does not answer: {error}", hint="check that its nodes run"
        ) from error
    except redis.exceptions.ResponseError as error:
        for sign, (detail, hint) in _REFUSALS.items():
            if sign in str(error):
                raise StoreUnavailable(detail, hint=hint) from error
        raise
