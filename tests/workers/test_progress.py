"""How far a task is, kept in a file: the latest count, whole, and never a reason to fail."""

from __future__ import annotations

from pathlib import Path

from workers.progress import TELL_SECONDS, ProgressFile, read_progress
from workers.types import Progress


def test_progress_file_holds_the_latest_count_and_is_not_written_at_every_one(tmp_path: Path) -> None:
    now, path = [0.0], tmp_path / "progress" / "task"
    tell = ProgressFile(path, clock=lambda: now[0])
    assert read_progress(path) is None
    seen = []
    for done in range(1, 5):
        tell(done, 5)
        seen.append(read_progress(path))
        now[0] += TELL_SECONDS / 2
    tell(5, 5)
    assert seen == [Progress(1, 5), Progress(1, 5), Progress(3, 5), Progress(3, 5)]
    assert read_progress(path) == Progress(5, 5)
    assert [file.name for file in path.parent.iterdir()] == ["task"]


def test_progress_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    ProgressFile(tmp_path / "taken" / "task")(1, 1)
    assert read_progress(tmp_path / "taken" / "task") is None
    (tmp_path / "taken").write_text("no JSON")
    assert read_progress(tmp_path / "taken") is None
