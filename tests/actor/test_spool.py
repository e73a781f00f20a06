import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from actor.spool import Spool, SpoolInUse
from buffer.codec import encode_group
from buffer.errors import StoreUnavailable
from tests.factories import make_group

OpenSpool = Callable[..., Spool]

WRITER = """
import sys
from pathlib import Path
from actor.spool import Spool
from tests.factories import make_group

spool = Spool(Path(sys.argv[1]), max_bytes=1 << 30)
number = 0
while True:
    spool.append([make_group(f"g{number}")])
    print(number, flush=True)
    number += 1
"""


@pytest.fixture
def open_spool(tmp_path: Path) -> Iterator[OpenSpool]:
    """Open the spool of this test, and close it at the end."""
    with ExitStack() as stack:
        yield lambda max_bytes=1 << 20: stack.enter_context(closing(Spool(tmp_path, max_bytes=max_bytes)))


def ids(spool: Spool) -> list[str]:
    return [group.group_id for group in spool.oldest(1000)]


def test_groups_come_back_in_order_as_they_were(open_spool: OpenSpool) -> None:
    spool = open_spool()
    groups = [make_group(f"g{i}") for i in range(12)]

    assert spool.append(groups) == 12
    first = spool.oldest(3)
    spool.pop()
    spool.append([make_group("last")])

    assert [encode_group(group) for group in first] == [encode_group(group) for group in groups[:3]]
    assert ids(spool) == [*(f"g{i}" for i in range(1, 12)), "last"]


def test_a_full_spool_takes_what_fits_and_says_how_much(tmp_path: Path, open_spool: OpenSpool) -> None:
    size = len(encode_group(make_group("g0")))
    spool = open_spool(2 * size + size // 2)

    assert spool.append([make_group(f"g{i}") for i in range(4)]) == 2
    assert spool.append([make_group("g4")]) == 0
    spool.pop()
    assert spool.append([make_group("g5")]) == 1

    assert ids(spool) == ["g1", "g5"]
    assert spool.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.group"))


def test_kill_9_loses_nothing_that_was_appended(tmp_path: Path, open_spool: OpenSpool) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 20:
        pass

    os.kill(writer.pid, signal.SIGKILL)
    said = [int(line) for line in writer.stdout]
    writer.wait()
    writer.stdout.close()
    spool = open_spool()
    spool.append([make_group("after")])

    found = ids(spool)
    assert found[:-1] == [f"g{i}" for i in range(len(found) - 1)]
    assert len(found) - 1 >= max(said, default=20) + 1
    assert found[-1] == "after"


def test_half_written_and_unreadable_files_do_not_stop_the_rest(tmp_path: Path, open_spool: OpenSpool) -> None:
    with_spool = open_spool()
    with_spool.append([make_group("g0"), make_group("g1")])
    with_spool.close()
    (tmp_path / "000000000003.partial").write_bytes(b"half")
    (tmp_path / "000000000001.group").write_bytes(b"rotten")

    spool = open_spool()

    assert ids(spool) == ["g1"]
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "000000000001.refused").read_bytes() == b"rotten"


def test_a_refused_group_is_set_aside_and_told_of_at_the_next_start(
    tmp_path: Path, open_spool: OpenSpool, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool()
    spool.append([make_group("g0")])

    spool.pop(refused=True)

    assert spool.num_groups == spool.num_bytes == 0
    assert len(list(tmp_path.glob("*.refused"))) == 1
    assert caplog.text == ""
    spool.close()
    open_spool()
    assert f"1 refused groups lie in {tmp_path}" in caplog.text


def test_a_disk_that_fails_for_a_while_costs_no_group(
    tmp_path: Path, open_spool: OpenSpool, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool()
    obstacle = tmp_path / "000000000002.partial"
    obstacle.mkdir()

    assert spool.append([make_group("g0"), make_group("g1"), make_group("g2")]) == 1
    assert spool.append([make_group("g1"), make_group("g2")]) == 0
    assert "cannot be written" in spool.why_full
    obstacle.rmdir()
    assert spool.append([make_group("g1"), make_group("g2")]) == 2
    assert caplog.text.count("groups wait") == 1

    first, kept = tmp_path / "000000000001.group", tmp_path / "kept"
    first.rename(kept)
    first.mkdir()  # neither read nor removed as a file
    with pytest.raises(StoreUnavailable, match=r"cannot be read: .*move the file away"):
        spool.oldest(2)
    with pytest.raises(StoreUnavailable, match="cannot be changed"):
        spool.pop()
    first.rmdir()
    kept.rename(first)
    assert ids(spool) == ["g0", "g1", "g2"]
    spool.pop()
    assert ids(spool) == ["g1", "g2"]


def test_two_actors_cannot_share_a_spool(open_spool: OpenSpool) -> None:
    owner = open_spool()

    with pytest.raises(SpoolInUse, match="belongs to a running actor"):
        open_spool()

    owner.close()
    open_spool()
