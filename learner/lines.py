"""Files of one JSON record a line, whose last line a crash may have cut off."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

log = logging.getLogger(__name__)

R = TypeVar("R")


def read_lines(path: Path, parse: Callable[[bytes], R]) -> Iterator[R]:
    """Yield the records, oldest first; a line for which `parse` raises ValueError is told and left out."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = parse(line)
        except ValueError:
            log.warning("%s has a broken line, left as it is: %.60s", path, line.decode(errors="replace"))
            continue
        yield record


def append_lines(path: Path) -> BinaryIO:
    """Open the file to write lines at its end: behind one that was cut off, on a line of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+")
    file.seek(max(0, file.tell() - 1))
    if file.read() not in (b"", b"\n"):
        file.write(b"\n")
    return file
