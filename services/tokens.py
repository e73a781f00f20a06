"""Bearer tokens as files, one a role, for processes that share a volume."""

import os
import secrets
from pathlib import Path

from buffer.errors import InvalidSettings
from services.security import TokenSettings

READABLE_BY_ALL = "read"
"""The role whose file other users may read: a metrics scraper runs as one, and may see statistics only."""


def make_tokens(directory: Path, given: TokenSettings) -> list[Path]:
    """Write the first given token of each role, and random ones where a role has neither; return the files written.

    Raises InvalidSettings when the directory cannot be written.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for role, tokens in given.by_role().items():
            path = directory / role
            if tokens or not path.is_file():
                token = tokens[0].get_secret_value() if tokens else secrets.token_urlsafe(32)
                _write(path, token, mode=0o444 if role == READABLE_BY_ALL else 0o400)
                written.append(path)
    except OSError as error:
        raise InvalidSettings(f"tokens cannot be written to {directory}: {error.strerror}") from error
    return written


def _write(path: Path, token: str, *, mode: int) -> None:
    """Make the file appear whole: a reader that sees it must not find an empty one."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    unfinished.replace(path)
