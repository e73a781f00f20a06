"""Tokens as files: made once, readable by their owner, the admin's given by hand if wanted."""

import stat
from pathlib import Path

import pytest

from buffer.errors import InvalidSettings
from services.security import TokenSettings
from services.settings import load_config
from services.tokens import make_tokens


def test_each_role_gets_its_own_token_once(tmp_path: Path) -> None:
    written = make_tokens(tmp_path / "new", TokenSettings())
    tokens = {path.name: path.read_text().strip() for path in written}

    assert set(tokens) == set(TokenSettings.model_fields)
    assert len(set(tokens.values())) == len(tokens)
    assert min(map(len, tokens.values())) >= 32
    assert make_tokens(tmp_path / "new", TokenSettings()) == []
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {
        role: 0o444 if role == "read" else 0o400 for role in tokens
    }


def test_a_given_admin_token_replaces_the_one_that_was_made(tmp_path: Path) -> None:
    make_tokens(tmp_path, TokenSettings())
    (written,) = make_tokens(tmp_path, TokenSettings.model_validate({"admin": "mine-since-today"}))

    assert (written.name, written.read_text()) == ("admin", "mine-since-today\n")


def test_settings_read_a_token_from_a_file_and_an_empty_variable_is_an_unset_one(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-the-file\n")
    file = {"STALEWISE_SERVICE__TOKEN_FILE": str(tmp_path / "token"), "STALEWISE_SERVICE__TOKEN": ""}

    token = load_config(None, environment=file).service.token

    assert token is not None
    assert token.get_secret_value() == "from-the-file"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"STALEWISE_SERVICE__TOKEN_FILE": "/nowhere/token"}, "STALEWISE_SERVICE__TOKEN_FILE=/nowhere/token cannot be"),
        ({"STALEWISE_SERVICE__TOKEN_FILE": "x", "STALEWISE_SERVICE__TOKEN": "y"}, "both STALEWISE_SERVICE__TOKEN and"),
    ],
)
def test_a_file_that_cannot_be_read_and_a_value_given_twice_are_refused(
    environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        load_config(None, environment=environment)
