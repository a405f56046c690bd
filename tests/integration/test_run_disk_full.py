"""A disk that is really full, under the whole command: a small tmpfs in the place of a folder of a run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from orchestrator.api.errors import INTERNAL, UNREACHABLE
from orchestrator.job import Reason
from orchestrator.store.store import Store
from tests.integration.test_run_killed import PATIENCE, World, assert_whole, left_behind, make_world


def may_mount() -> bool:
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return tried.returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="this user may not mount a small file system")


@contextmanager
def mounted(folder: Path, size: str = "20k") -> Generator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(folder: Path, size: str = "256m") -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "world", 1, "--local")


@pytest.mark.timeout(900)
def test_run_in_a_home_that_is_full_says_one_sentence_and_goes_on_when_there_is_room(world):
    """From too little for the store, over too little for MLflow, to too little for the adapters."""
    with mounted(world.home, "16k"):
        for size in ("16k", "128k", "1m", "3m"):
            enlarge(world.home, size)
            code, said = give(world)
            assert code in (INTERNAL, UNREACHABLE), (size, said)
            assert "Traceback" not in said, said
            sentence = said.splitlines()[-1]
            assert sentence.startswith("chorus: "), said
            assert f"{world.home}" in sentence
            assert " MB free" in sentence
            assert not (world.folder / "release").exists()
        enlarge(world.home)
        world.finish()
        assert_whole(left_behind(world))


@pytest.mark.timeout(900)
def test_run_whose_folders_are_full_waits_and_goes_on_when_there_is_room(world):
    places = (world.home / "checkpoints", world.home / "fusions", world.folder / "release")
    with mounted(places[0]), mounted(places[1]), mounted(places[2]):
        process = world.start()
        try:
            for place in places:
                assert waits_for_room(world, process, place).endswith("MB free")
                enlarge(place)
            world.finish(process)
        finally:
            process.kill()
        assert_whole(left_behind(world))
        scratch = [path for place in places for path in place.rglob(".*") if path.is_dir()]
        assert not scratch, "something half-done was left"


def give(world: World) -> tuple[int, str]:
    done = subprocess.run(
        world.command(),
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


def waits_for_room(world: World, process: subprocess.Popen[bytes], place: Path) -> str:
    """What the first job says that finds no room in `place`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, world.said()
        said = [words for words in full_words(world.home / "chorus.db") if f"{place}/" in words]
        if said:
            return said[0]
        time.sleep(0.1)
    raise AssertionError(world.said())


def full_words(database: Path) -> list[str]:
    if not database.exists():
        return []
    with closing(Store.open(database)) as store:
        return [job.message for job in store.jobs() if job.reason is Reason.DISK_FULL]
