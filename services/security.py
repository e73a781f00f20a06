"""Who may do what: bearer tokens, and one table of role by route."""

import hmac
import ipaddress
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, SecretStr

from buffer.errors import Forbidden, InvalidSettings, Unauthorized
from buffer.settings import Settings
from buffer.types import Role

_WRITERS: frozenset[Role] = frozenset({"submit", "act", "admin"})
_ACTORS: frozenset[Role] = frozenset({"act", "admin"})
_LEARNERS: frozenset[Role] = frozenset({"learn", "admin"})
_PULLERS: frozenset[Role] = frozenset({"act", "learn", "admin"})
_READERS: frozenset[Role] = frozenset({"read", "learn", "admin"})
_MEMBERS: frozenset[Role] = frozenset({"submit", "act", "learn", "read", "admin"})
_ADMINS: frozenset[Role] = frozenset({"admin"})
_ANYONE: frozenset[Role] | None = None

ACCESS: Mapping[str, frozenset[Role] | None] = {
    "POST /v1/groups": _WRITERS,
    "POST /v1/trajectories": _WRITERS,
    "GET /v1/groups": _READERS,
    "GET /v1/groups/{group_id:path}": _READERS,
    "GET /v1/export": _ADMINS,
    "POST /v1/import": _ADMINS,
    "POST /v1/sample": _LEARNERS,
    "POST /v1/priorities": _LEARNERS,
    "GET /v1/prompts": _READERS,
    "GET /v1/run": _MEMBERS,
    "GET /v1/stats": _READERS,
    "GET /v1/history": _READERS,
    "GET /v1/trained": _READERS,
    "GET /v1/trained/{group_id:path}": _READERS,
    "POST /v1/token_texts": _READERS,
    "GET /metrics": _READERS,
    "PUT /v1/weights/blobs/{sha256}": _LEARNERS,
    "PUT /v1/weights/{version}": _LEARNERS,
    "GET /v1/weights/latest": _PULLERS,
    "GET /v1/weights/{version}": _PULLERS,
    "GET /v1/weights/blobs/{sha256}": _PULLERS,
    "GET /v1/evaluations": _READERS,
    "POST /v1/evaluations/claims": _ACTORS,
    "PUT /v1/evaluations/{version}": _ACTORS,
    "POST /v1/actors/{actor_id:path}/heartbeat": _ACTORS,
    "POST /v1/learner/metrics": _LEARNERS,
    "GET /": _ANYONE,  # the page holds no data: it asks for a token and reads /v1/stats with it
    "GET /static/{name}": _ANYONE,
    "GET /healthz": _ANYONE,
    "GET /readyz": _ANYONE,
}
"""Route -> roles that may use it; None = no token needed. A route that is not in it cannot be registered."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Tokens = Annotated[tuple[Annotated[SecretStr, Field(min_length=8)], ...], BeforeValidator(_as_tuple)]


class TokenSettings(Settings):
    """Bearer tokens by role; one token or a list. None at all = no authentication, on loopback only."""

    submit: Tokens = ()
    """May insert groups: for foreign agents. At least 8 characters, as everywhere here."""
    act: Tokens = ()
    """May insert groups, fetch weights and send heartbeats: for our actors."""
    learn: Tokens = ()
    """May sample, publish weights and read: for the learner."""
    read: Tokens = ()
    """May read statistics and groups: for the dashboard."""
    admin: Tokens = ()
    """May do everything."""

    def by_role(self) -> dict[Role, Tokens]:
        """Return the tokens of each role."""
        return {
            "submit": self.submit,
            "act": self.act,
            "learn": self.learn,
            "read": self.read,
            "admin": self.admin,
        }


class Guard:
    """Lets a request pass, or raises Unauthorized or Forbidden."""

    def __init__(self, settings: TokenSettings) -> None:
        self._tokens = [
            (token.get_secret_value().encode(), role) for role, tokens in settings.by_role().items() for token in tokens
        ]

    @property
    def tokens_required(self) -> bool:
        """Whether any token is configured; without one every request passes."""
        return bool(self._tokens)

    def check(self, route: str, authorization: str | None) -> None:
        """Check the Authorization header of a request to a route of ACCESS, in time that tells nothing of tokens."""
        allowed = ACCESS[route]
        if allowed is None or not self._tokens:
            return
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized(f"{route} needs a token", hint="send `Authorization: Bearer <token>`")
        given = token.strip().encode()
        roles = {role for known, role in self._tokens if hmac.compare_digest(known, given)}
        if not roles:
            raise Unauthorized("the token is unknown", hint="use a token of the service.tokens settings")
        if not roles & allowed:
            raise Forbidden(
                f"a token of role {' and '.join(sorted(roles))} may not use {route}",
                hint=f"use a token of role {', '.join(sorted(allowed))}",
            )


def check_bind(host: str, tokens: TokenSettings) -> None:
    """Raise InvalidSettings for an address that others can reach while no token is configured."""
    if any(tokens.by_role().values()) or _is_loopback(host):
        return
    raise InvalidSettings(
        f"service.host={host} can be reached from other machines, but no token is configured",
        hint="set service.tokens, for example STALEWISE_SERVICE__TOKENS__ADMIN, or bind 127.0.0.1",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
