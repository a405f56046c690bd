"""Folders in an object store, on a disk and over HTTP: whole, verified both ways, or absent."""

from __future__ import annotations

import json
import re
import sys

import fsspec
import pytest

from workers import object_store
from workers.manifest import MANIFEST, CorruptFolder, folder_digest, publish_folder, verify_folder
from workers.object_store import ObjectStore, problem, shown
from workers.types import CheckpointsAway


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store/step"
    return f"s3://{request.getfixturevalue('s3').bucket()}/home/step"


@pytest.fixture
def store(url):
    return ObjectStore(url)


@pytest.fixture
def objects(url):
    """What lies in the store, past everything: path below the URL -> bytes, and a way to change it."""
    return Objects(url)


class Objects:
    def __init__(self, url):
        self.fs, self.root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)

    def paths(self):
        return sorted(path.removeprefix(f"{self.root}/") for path in self.fs.find(self.root))

    def folders(self):
        return sorted({path.partition(".")[0] for path in self.paths()})

    def one(self, ending):
        (path,) = (path for path in self.fs.find(self.root) if path.endswith(ending))
        return path

    def alter(self, ending, change):
        path = self.one(ending)
        self.fs.pipe_file(path, change(self.fs.cat_file(path)))

    def remove(self, ending):
        self.fs.rm_file(self.one(ending))


def published(parent, name, text="weights"):
    with publish_folder(parent / name, {"step": 3}) as scratch:
        (scratch / "weights.bin").write_text(text)
        (scratch / "parts").mkdir()
        (scratch / "parts" / "more.bin").write_bytes(bytes(range(256)) * 100)
    return parent / name


def names(store, prefix="step-"):
    return [stored.name for stored in store.whole(prefix)]


def the_last(store, prefix="step-"):
    return next(store.whole(prefix))


def flipped(content):
    return bytes([content[0] ^ 1]) + content[1:]


def test_folder_put_and_fetched_is_the_same_bytes_with_the_same_manifest(store, tmp_path):
    folder = published(tmp_path / "here", "step-000003")
    store.put(folder)
    stored = the_last(store)
    assert (stored.name, stored.digest) == ("step-000003", folder_digest(folder))
    store.fetch(stored, tmp_path / "there" / stored.name)
    assert verify_folder(tmp_path / "there" / stored.name) == verify_folder(folder)
    assert (tmp_path / "there" / stored.name / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_folder_put_twice_is_there_once_and_nothing_is_sent_again(store, objects, tmp_path, monkeypatch):
    folder = published(tmp_path, "step-000003")
    store.put(folder)
    before = objects.paths()
    monkeypatch.setattr(store._fs, "put_file", None)
    store.put(folder)
    assert objects.paths() == before
    assert len(before) == 3


def test_upload_that_breaks_off_leaves_no_folder_and_can_be_done_again(store, objects, tmp_path, monkeypatch):
    folder = published(tmp_path, "step-000003")
    put_file, sent = store._fs.put_file, []

    def once(path, place, **options):
        if sent:
            raise TimeoutError("no answer")
        sent.append(place)
        return put_file(path, place, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "put_file", once)
        with pytest.raises(CheckpointsAway, match="no answer"):
            store.put(folder)
    assert len(objects.paths()) == 1
    assert names(store) == []

    def counting(path, place):
        sent.append(place)
        return put_file(path, place)

    monkeypatch.setattr(store._fs, "put_file", counting)
    store.put(folder)
    assert names(store) == ["step-000003"]
    assert len(sent) == len(set(sent)) == 2, "what was there already is not sent again"


def test_upload_that_is_not_kept_as_it_was_sent_gets_no_manifest(store, objects, tmp_path, monkeypatch):
    put_file = store._fs.put_file

    def altering(path, place, **options):
        put_file(path, place, **options)
        if place.endswith("weights.bin"):
            store._fs.pipe_file(place, flipped(store._fs.cat_file(place)))

    monkeypatch.setattr(store._fs, "put_file", altering)
    with pytest.raises(CheckpointsAway, match=r"does not hold step-000003/weights\.bin as it was put"):
        store.put(published(tmp_path, "step-000003"))
    assert not any(path.endswith(MANIFEST) for path in objects.paths())


def test_altered_byte_is_refused_on_the_way_down_and_nothing_is_published(store, objects, tmp_path):
    store.put(published(tmp_path / "here", "step-000003"))
    objects.alter("weights.bin", flipped)
    with pytest.raises(CorruptFolder, match=r"weights\.bin of step-000003 is not what its manifest says"):
        store.fetch(the_last(store), tmp_path / "there" / "step-000003")
    assert list((tmp_path / "there").iterdir()) == []


def test_altered_byte_is_mended_by_who_puts_the_folder_again(store, objects, tmp_path):
    folder = published(tmp_path / "here", "step-000003")
    store.put(folder)
    objects.alter("weights.bin", flipped)
    store.put(folder)
    store.fetch(the_last(store), tmp_path / "there" / "step-000003")


def test_torn_folders_are_absent(store, objects, tmp_path):
    """A file cut short, one gone, an altered manifest: each alone, and the one before them stands."""
    for step in range(1, 5):
        store.put(published(tmp_path, f"step-00000{step}", f"step {step}"))
    here = {path.partition(".")[0]: path for path in objects.paths() if path.endswith("weights.bin")}
    objects.alter(here["step-000004"], lambda content: content[:-1])
    objects.remove(here["step-000003"])
    objects.alter(here["step-000002"].replace("weights.bin", MANIFEST), lambda text: text + b" ")
    assert names(store) == ["step-000001"]


def test_manifest_that_names_a_file_outside_its_folder_is_not_followed(store, objects, tmp_path):
    entry = {"sha256": "0" * 64, "bytes": 1}
    text = json.dumps({"files": {"../../evil": entry}}).encode()
    place = f"{objects.root}/step-000009.{object_store._id(text)}"
    if getattr(objects.fs, "local_file", False):
        objects.fs.makedirs(place)
    objects.fs.pipe_file(f"{place}/{MANIFEST}", text)
    assert names(store) == []


def test_prune_keeps_the_last_two_whole_ones_and_removes_older_torn_ones(store, objects, tmp_path):
    for step in (1, 2, 3):
        store.put(published(tmp_path, f"step-00000{step}", f"step {step}"))
    objects.remove(
        next(path for path in objects.paths() if path.startswith("step-000001") and MANIFEST in path)
    )
    store.put(published(tmp_path, "adapter"))
    store.prune("step-", 2)
    assert objects.folders() == ["adapter", "step-000002", "step-000003"]


def test_prune_with_a_torn_newest_one_keeps_two_that_are_whole(store, objects, tmp_path):
    for step in (1, 2, 3, 4):
        store.put(published(tmp_path, f"step-00000{step}", f"step {step}"))
    objects.remove(
        next(path for path in objects.paths() if path.startswith("step-000004") and MANIFEST in path)
    )
    store.prune("step-", 2)
    assert objects.folders() == ["step-000002", "step-000003", "step-000004"]
    assert names(store) == ["step-000003", "step-000002"]


def test_equal_steps_of_two_writers_lie_side_by_side(store, objects, tmp_path):
    """As of a host that was given up and still writes, beside the one that took its place."""
    store.put(published(tmp_path / "one", "step-000003", "of one"))
    store.put(published(tmp_path / "other", "step-000003", "of the other"))
    assert names(store) == ["step-000003"] * 2
    for number, stored in enumerate(store.whole("step-")):
        store.fetch(stored, tmp_path / f"fetched-{number}")
    found = {(tmp_path / f"fetched-{number}" / "weights.bin").read_text() for number in (0, 1)}
    assert found == {"of one", "of the other"}


def test_folder_that_another_fetches_meanwhile_is_left_to_it_whole(store, tmp_path, monkeypatch):
    store.put(published(tmp_path, "step-3"))
    stored, final, digest = the_last(store), tmp_path / "back" / "step-3", object_store.file_digest

    def late(path):
        if not final.exists():
            monkeypatch.setattr(object_store, "file_digest", digest)
            store.fetch(stored, final)
        return digest(path)

    monkeypatch.setattr(object_store, "file_digest", late)
    with pytest.raises(FileExistsError, match="never overwritten"):
        store.fetch(stored, final)
    verify_folder(final)
    assert [path.name for path in final.parent.iterdir()] == ["step-3"]


def test_full_disk_while_fetching_is_no_absence_of_the_store(store, tmp_path, monkeypatch):
    store.put(published(tmp_path, "step-000003"))
    stored = the_last(store)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._fs, "get_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        store.fetch(stored, tmp_path / "there")
    assert not isinstance(raised.value, CheckpointsAway)


def test_s3_that_breaks_off_every_connection_is_away_and_is_there_again(s3, tmp_path):
    store = ObjectStore(f"s3://{s3.bucket()}/home/step")
    folder = published(tmp_path, "step-000003")
    with s3.away():
        for ask in (lambda: store.put(folder), lambda: names(store)):
            with pytest.raises(CheckpointsAway, match=r"^s3://chorus-.*/home/step: "):
                ask()
        with pytest.raises(CheckpointsAway):
            problem("s3://chorus-somewhere/else")
    store.put(folder)
    assert names(store) == ["step-000003"]


def test_s3_object_in_several_parts_is_read_back_for_its_digest(s3, tmp_path, monkeypatch):
    """Its ETag is no MD5."""
    store = ObjectStore(f"s3://{s3.bucket()}/home/step")
    monkeypatch.setattr(object_store, "_etag", lambda info: "0123-2")
    opened, open_file = [], store._fs.open
    monkeypatch.setattr(store._fs, "open", lambda place, mode: opened.append(place) or open_file(place, mode))
    store.put(published(tmp_path, "step-000003"))
    assert len(opened) == 2
    assert names(store) == ["step-000003"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("checkpoints/here", r"cannot be used: it is no URL; write s3://BUCKET/PREFIX"),
        ("s4://bucket/prefix", r"cannot be used: Protocol not known: s4; write s3://BUCKET/PREFIX"),
        ("s3://", r"cannot be used: it names no bucket"),
        ("s3://chorus-nowhere/prefix", r"is not there: .*bucket does not exist.*; make the bucket"),
        ("s3://No_Such_Name!/prefix", r"cannot be used: .*bucket name.*; set what its driver needs"),
    ],
)
def test_store_that_cannot_be_used_is_refused_in_a_sentence(s3, given, words):
    found = problem(given)
    assert found is not None
    assert re.search(words, found, re.IGNORECASE), found
    assert "\n" not in found


def test_store_whose_driver_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert problem("s3://bucket/prefix") == (
        "needs a package that is not installed (Install s3fs to access S3); "
        "for s3: pip install -c constraints.txt s3fs"
    )


def test_store_without_credentials_says_so(s3, monkeypatch, tmp_path):
    bucket = s3.bucket()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    driver = fsspec.get_filesystem_class("s3")
    driver.clear_instance_cache()
    try:
        found = problem(f"s3://{bucket}/prefix")
    finally:
        driver.clear_instance_cache()
    assert found == (
        "cannot be used: Unable to locate credentials; set what its driver needs (for s3: AWS_PROFILE, "
        "AWS_REGION ...)"
    )


def test_store_that_can_be_used_has_no_problem(url):
    assert problem(url) is None


def test_url_is_shown_without_user_and_password():
    assert shown("sftp://ann:secret@host:22/path") == "sftp://host:22/path"
    assert shown("s3://bucket/prefix") == "s3://bucket/prefix"
