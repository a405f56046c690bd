"""A home that has lost its adapters: the controller has them from the object store, or made again."""

from __future__ import annotations

import shutil
from itertools import count

import pytest

from orchestrator import checkpoints
from orchestrator.job import Reason, Status
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from tests.orchestrator.fakes import Later, write_peft
from tests.orchestrator.recipe_files import finance, support, write_world
from tests.orchestrator.test_controller import FINANCE, World, fused
from workers.manifest import publish_folder, verify_folder
from workers.object_store import ObjectStore
from workers.types import BadInput, CheckpointsAway

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    made = World(tmp_path, MemoryRegistry(tmp_path / "registry"))
    yield made
    made.store.close()


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/store"


def lose(world):
    shutil.rmtree(world.folder / "home" / "checkpoints")


def trained(world, url):
    """As soon as the one job has its adapter, its home loses it."""
    controller = world.controller(checkpoints=url)
    while not list(world.folder.glob("home/checkpoints/*/adapter")):
        controller.tick()
    lose(world)


def test_attach_names_the_place_of_its_training_in_the_store(world, url):
    world.submit(finance())
    world.run(checkpoints=url)
    (command,) = world.cluster.asked("Attach")
    step = next(iter((world.folder / "home" / "checkpoints").iterdir())).name
    assert command.job.checkpoint_url == f"{url}/{step}"
    assert [stored.name for stored in ObjectStore(f"{url}/{step}").whole("adapter")] == ["adapter"]


def test_adapter_that_its_home_has_lost_is_fetched_to_be_scored_and_not_trained_again(world, url):
    world.submit(finance())
    trained(world, url)
    world.run(checkpoints=url)
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert world.cluster.asked("Attach") == []
    (folder,) = world.folder.glob("home/checkpoints/*/adapter")
    verify_folder(folder)


def test_adapters_that_their_home_has_lost_are_fetched_to_be_fused(world, url):
    world.submit(finance())
    world.submit(support())
    world.run(checkpoints=url)
    lose(world)
    world.submit(finance(), support(), **fused())
    world.run(checkpoints=url)
    assert set(world.statuses().values()) == {Status.SUCCEEDED}, world.words()
    assert world.cluster.asked("Attach") == []
    assert (world.folder / "released" / "README.md").exists()


def test_adapter_lost_on_its_way_to_the_registry_is_fetched_to_be_registered(world, url):
    later = Later()
    later.held = True
    world.submit(finance())

    def look() -> None:
        if later.held and later.waiting and world.job("finance").status is Status.STOPPING:
            lose(world)
            later.held = False
        later.do()

    world.run(on_tick=look, start=later, checkpoints=url)
    assert not later.held
    assert list(world.folder.glob("home/checkpoints/*/adapter"))
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert len(world.cluster.asked("Attach")) == 1
    assert world.registry.version(FINANCE, "champion").version == 1


def test_store_that_is_away_is_waited_for_in_words(world, url, monkeypatch):
    world.submit(finance())
    trained(world, url)
    asked, whole, said = count(), ObjectStore.whole, set()

    def away(self, prefix):
        if next(asked) < 3:
            raise CheckpointsAway(f"{url}: no answer")
        return whole(self, prefix)

    monkeypatch.setattr(ObjectStore, "whole", away)
    world.run(
        checkpoints=url, on_tick=lambda: said.add((world.job("finance").reason, world.job("finance").message))
    )
    assert (Reason.CHECKPOINTS_AWAY, f"{url}: no answer") in said
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert world.cluster.asked("Attach") == []
    times = [e.at for e in world.store.events(world.job("finance").id) if e.reason is Reason.CHECKPOINTS_AWAY]
    assert len(times) == 3
    assert times[2] - times[1] > times[1] - times[0]


def weights_in(store):
    (weights,) = store.glob("*/adapter.*/adapter_model.safetensors")
    return weights


def put_others(world, url, weights):
    """Adapters that were not the one made, under ids before and after its."""
    for number in range(6):
        folder = world.folder / f"other-{number}" / "adapter"
        with publish_folder(folder) as scratch:
            write_peft(scratch, 4, 4, f"{number:064}")
        ObjectStore(f"{url}/{weights.parent.parent.name}").put(folder)


def test_adapter_is_fetched_by_the_digest_on_record(world, url, tmp_path):
    world.submit(finance())
    trained(world, url)
    put_others(world, url, weights_in(tmp_path / "store"))
    world.run(checkpoints=url)
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert world.cluster.asked("Attach") == []


@pytest.mark.parametrize("harm", ["altered", "gone", "others"])
def test_adapter_that_the_store_does_not_have_as_it_was_made_is_made_again(world, url, tmp_path, harm):
    world.submit(finance())
    trained(world, url)
    weights = weights_in(tmp_path / "store")
    if harm == "altered":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shutil.rmtree(weights.parent)
    if harm == "others":
        put_others(world, url, weights)
    world.run(checkpoints=url)
    assert world.job("finance").status is Status.SUCCEEDED, world.words()
    assert len(world.cluster.asked("Attach")) == 1


# ---- what a user names -------------------------------------------------------------------------------------


def test_setting_that_is_not_set_asks_nothing():
    assert (checkpoints.named({}), checkpoints.trouble({})) == ("", None)


def test_setting_with_a_mistake_is_refused_naming_the_variable():
    with pytest.raises(
        BadInput, match=r"^CHORUS_CHECKPOINTS: s4://bucket/x cannot be used: Protocol not known"
    ):
        checkpoints.check({checkpoints.VARIABLE: "s4://bucket/x/"})


def test_run_and_serve_with_a_bucket_that_is_not_there_end_in_one_sentence(tmp_path, monkeypatch, s3):
    world = CliWorld(tmp_path)
    monkeypatch.setenv(checkpoints.VARIABLE, "s3://chorus-nowhere/prefix")
    for command in (("run", world.one_job()), ("serve",)):
        result = world.chorus(*command)
        assert_one_sentence(result, 2, "CHORUS_CHECKPOINTS: s3://chorus-nowhere/prefix is not there: ")
    assert not world.home.folder.exists()


def test_run_keeps_adapters_in_the_store_that_is_named(tmp_path, monkeypatch, url):
    world = CliWorld(tmp_path)
    monkeypatch.setenv(checkpoints.VARIABLE, url)
    assert world.chorus("run", world.one_job()).exit_code == 0
    (step,) = (tmp_path / "store").iterdir()
    assert [stored.name for stored in ObjectStore(f"{url}/{step.name}").whole("")] == ["adapter"]
    assert (world.home.folder / "checkpoints" / step.name / "adapter").is_dir()


def test_store_that_is_away_at_the_start_is_no_mistake(s3):
    url = f"s3://{s3.bucket()}/prefix"
    with s3.away():
        checkpoints.check({checkpoints.VARIABLE: url})


def test_doctor_says_whether_the_store_can_be_used(tmp_path, monkeypatch, s3):
    world = CliWorld(tmp_path)

    def said():
        return {check["what"]: check for check in world.read("doctor")}.get(checkpoints.VARIABLE)

    assert said() is None
    monkeypatch.setenv(checkpoints.VARIABLE, f"s3://{s3.bucket()}/prefix")
    assert said()["state"] == "ok"
    monkeypatch.setenv(checkpoints.VARIABLE, "s3://chorus-nowhere/prefix")
    assert said()["state"] == "missing"
    assert "make the bucket" in said()["todo"]
    with s3.away():
        assert said()["found"] == "does not answer"
