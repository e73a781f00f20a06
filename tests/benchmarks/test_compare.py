"""`make compare`: what it shows."""

from pathlib import Path

from benchmarks.compare import METHODS, chart, save_png
from benchmarks.study.simulation import Point

POINTS: list[Point] = [(0, 0, 0.2), (90, 11_520, 0.4), (180, 23_040, 0.9)]


def test_the_chart_names_every_method_and_reaches_its_accuracy() -> None:
    lines = chart(dict.fromkeys(METHODS, POINTS), lag=128, updates=180).splitlines()

    assert "data 128 updates old" in lines[0]
    assert all(any(label in line for line in lines) for label in METHODS.values())


def test_a_method_without_a_point_yet_is_left_out() -> None:
    shown = chart({"grpo": POINTS[:1], "tis": [], "stalewise": []}, lag=128, updates=180)

    assert "GRPO" in shown
    assert "stalewise" not in shown


def test_the_picture_is_written(tmp_path: Path) -> None:
    save_png(dict.fromkeys(METHODS, POINTS), tmp_path / "new" / "compare.png", lag=128)

    assert (tmp_path / "new" / "compare.png").read_bytes().startswith(b"\x89PNG")
