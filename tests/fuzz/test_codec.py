"""Coverage-guided fuzzing of what reads foreign bytes: no crash, no hang, no heap, and no second meaning."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.corpus import write_corpus

pytest.importorskip("atheris", reason="atheris has no wheel for this platform")

LIMITS = ("-max_len=4096", "-rss_limit_mb=1024", "-timeout=60")
"""Bytes of an input; MiB of the process; seconds after which one input is a hang."""


@pytest.mark.parametrize(
    ("target", "executions"), [("stored_record", 60_000), ("msgpack_body", 15_000), ("json_body", 40_000)]
)
def test_any_bytes_are_a_record_or_a_named_error(
    target: str, executions: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    runs = round(executions * request.config.getoption("fuzz_scale"))
    write_corpus(target, tmp_path / "corpus")
    options = [f"-runs={runs}", "-seed=1", *LIMITS, f"-artifact_prefix={tmp_path}/"]

    command = [sys.executable, "-m", "tests.fuzz.codec_target", target, str(tmp_path / "corpus"), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {runs} runs" in done.stderr
