"""`doctor` and `ui`: what they say of this machine."""

from __future__ import annotations

import errno
import socket
from importlib.metadata import PackageNotFoundError, version

import pytest

from orchestrator.api.errors import explain
from orchestrator.commands import doctor
from orchestrator.commands.leftovers import remove_unpublished
from orchestrator.home import Home, HomeBusy
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence


@pytest.fixture
def world(tmp_path):
    return CliWorld(tmp_path)


def test_doctor_checks_every_pinned_package_and_the_machine(world):
    found = {check["what"]: check for check in world.read("doctor")}
    assert found["torch"]["found"] == version("torch")
    assert {"Python", "ray", "mlflow", "deepspeed", "cores", "memory", "disk", "loopback", "GPU"} <= set(
        found
    )
    assert all(check["todo"] for check in found.values() if check["state"] != "ok")
    assert not world.home.folder.exists()


def test_doctor_of_a_machine_without_mlflow_says_how_to_install_it_and_exits_with_1(world, monkeypatch):
    def without_mlflow(name):
        if name == "mlflow":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without_mlflow)
    result = world.chorus("doctor")
    assert result.exit_code == 1
    row = next(line for line in result.stdout.splitlines() if line.startswith("mlflow"))
    assert "missing" in row
    assert "pip install -c constraints.txt 'mlflow" in row


def test_doctor_of_a_machine_with_an_old_package_names_the_version_it_wants(world, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    states = {check["what"]: check for check in world.read("doctor")}
    assert states["torch"]["state"] == "missing"
    assert "==2.13.0 is wanted" in states["torch"]["todo"]


def test_doctor_of_a_machine_without_a_compiler_finds_nothing_missing_for_it(world, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    states = {check["what"]: check["state"] for check in world.read("doctor")}
    assert {states["compiler"], states["GPU"], states["chromium"]} == {"optional"}


def test_ui_on_a_port_in_use_is_refused_in_one_sentence(world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_sentence(world.chorus("ui", "--port", port), 2, f"port {port} is in use")


# ---- what the commands rest on ----------------------------------------------------------------------------


def test_home_lock_is_free_again_when_its_holder_has_ended(tmp_path):
    home = Home(tmp_path / "home")
    assert not home.claimed()
    with home.claim():
        assert home.claimed()
        with pytest.raises(HomeBusy), home.claim():
            pass
    assert not home.claimed()
    with home.claim():
        pass


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    release = tmp_path / "release" / "assistant"
    scratch = f".assistant.{'a' * 32}"
    for kept in (release, release.parent / f".other.{'a' * 32}", tmp_path / "home/fusions/step"):
        kept.mkdir(parents=True)
    for left in (
        release.parent / scratch,
        tmp_path / "home/fusions" / scratch,
        tmp_path / "home/downloads" / scratch,
    ):
        left.mkdir(parents=True)
    remove_unpublished(tmp_path / "home", [release])
    assert sorted(path.name for path in release.parent.iterdir()) == [f".other.{'a' * 32}", "assistant"]
    assert [path.name for path in (tmp_path / "home/fusions").iterdir()] == ["step"]
    assert list((tmp_path / "home/downloads").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "the disk takes no more (x.bin)"),
        (PermissionError(errno.EACCES, "Permission denied", "home"), 1, "Permission denied (home)"),
        (ModuleNotFoundError("No module named 'ray'", name="ray"), 1, "ray is not installed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_code_and_a_sentence(error, code, words):
    found = explain(error)
    assert found is not None
    assert found[0] == code
    assert words in found[1]


def test_errors_of_our_own_making_keep_their_traceback():
    assert explain(RuntimeError("a bug")) is None
