"""Who may do what: one row per route, tested for every role."""

from collections.abc import Iterator
from typing import get_args

import httpx
import pytest
from pydantic import SecretStr

from buffer.errors import InvalidSettings
from buffer.types import Role
from services.context import ServiceSettings
from services.security import ACCESS, TokenSettings, check_bind
from tests.services.live import make_context, serving

ROLES: tuple[Role, ...] = get_args(Role)
TOKENS = TokenSettings(**{role: (SecretStr(f"{role}-token"),) for role in ROLES})

ALLOWED = {
    "POST /v1/groups": "submit act admin",
    "POST /v1/trajectories": "submit act admin",
    "GET /v1/groups": "learn read admin",
    "GET /v1/groups/{group_id:path}": "learn read admin",
    "GET /v1/export": "admin",
    "POST /v1/import": "admin",
    "POST /v1/sample": "learn admin",
    "GET /v1/run": "submit act learn read admin",
    "POST /v1/priorities": "learn admin",
    "GET /v1/prompts": "learn read admin",
    "GET /v1/stats": "learn read admin",
    "GET /v1/history": "learn read admin",
    "GET /v1/trained": "learn read admin",
    "GET /v1/trained/{group_id:path}": "learn read admin",
    "POST /v1/token_texts": "learn read admin",
    "GET /metrics": "learn read admin",
    "PUT /v1/weights/blobs/{sha256}": "learn admin",
    "PUT /v1/weights/{version}": "learn admin",
    "GET /v1/weights/latest": "act learn admin",
    "GET /v1/weights/{version}": "act learn admin",
    "GET /v1/weights/blobs/{sha256}": "act learn admin",
    "GET /v1/evaluations": "learn read admin",
    "POST /v1/evaluations/claims": "act admin",
    "PUT /v1/evaluations/{version}": "act admin",
    "POST /v1/actors/{actor_id:path}/heartbeat": "act admin",
    "POST /v1/learner/metrics": "learn admin",
}
OPEN = {"GET /", "GET /static/{name}", "GET /healthz", "GET /readyz"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    context = make_context(tmp_path_factory.mktemp("guarded"), settings=ServiceSettings(tokens=TOKENS))
    with serving(context) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def call(client: httpx.Client, route: str, authorization: str | None) -> httpx.Response:
    method, path = route.split(" ")
    for name, value in {"group_id:path": "g", "version": "0", "sha256": "0" * 64, "actor_id:path": "a"}.items():
        path = path.replace(f"{{{name}}}", value)
    headers = {"Authorization": authorization} if authorization else {}
    return client.request(method, path.replace("{name}", "page.js"), headers=headers)


def test_table_has_these_rows() -> None:
    rows = {route: roles and " ".join(role for role in ROLES if role in roles) for route, roles in ACCESS.items()}

    assert rows == ALLOWED | dict.fromkeys(OPEN)


@pytest.mark.parametrize("route", ALLOWED)
def test_each_role_passes_where_the_table_says_so(guarded: httpx.Client, route: str) -> None:
    passed = [role for role in ROLES if call(guarded, route, f"Bearer {role}-token").status_code not in (401, 403)]

    assert " ".join(passed) == ALLOWED[route]


@pytest.mark.parametrize("route", sorted(OPEN))
def test_open_route_needs_no_token(guarded: httpx.Client, route: str) -> None:
    assert call(guarded, route, None).status_code == 200


@pytest.mark.parametrize(
    ("authorization", "status", "detail"),
    [
        (None, 401, "GET /v1/stats needs a token"),
        ("Basic cmVhZDpyZWFk", 401, "GET /v1/stats needs a token"),
        ("Bearer", 401, "GET /v1/stats needs a token"),
        ("Bearer unknown-token", 401, "the token is unknown"),
        ("Bearer submit-token", 403, "a token of role submit may not use GET /v1/stats"),
    ],
)
def test_refusal_is_a_sentence_in_the_one_error_shape(
    guarded: httpx.Client, authorization: str | None, status: int, detail: str
) -> None:
    response = call(guarded, "GET /v1/stats", authorization)

    assert (response.status_code, response.json()["detail"]) == (status, detail)
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


def test_refusal_comes_before_the_body_is_read(guarded: httpx.Client) -> None:
    response = guarded.post("/v1/groups", content=b"[" * 100_000, headers={"Content-Type": "application/json"})

    assert response.status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_open_bind_without_a_token_is_refused(host: str) -> None:
    with pytest.raises(InvalidSettings, match="can be reached from other machines, but no token is configured"):
        check_bind(host, TokenSettings())


@pytest.mark.parametrize(
    ("host", "tokens"), [("127.0.0.1", TokenSettings()), ("::1", TokenSettings()), ("0.0.0.0", TOKENS)]
)
def test_loopback_or_token_is_enough(host: str, tokens: TokenSettings) -> None:
    check_bind(host, tokens)
