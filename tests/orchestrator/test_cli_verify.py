"""`chorus verify`: a release folder is checked where it lies, without a home."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner

from orchestrator.commands.cli import app
from tests.orchestrator.cli_world import assert_one_sentence
from workers.manifest import publish_folder
from workers.signature import sign


@pytest.fixture
def released(tmp_path: Path) -> Path:
    with publish_folder(tmp_path / "release") as scratch:
        (scratch / "adapter_model.safetensors").write_bytes(b"weights")
        (scratch / "README.md").write_text("# a card\n")
    return tmp_path / "release"


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public), in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def verify(*arguments: object):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_verify_release_as_it_was_written_is_told(released):
    result = verify(released)
    assert result.exit_code == 0, result.stderr
    assert "2 files as they were released" in result.stdout


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "new.py"])
def test_verify_altered_or_added_file_is_refused_by_name(released, name):
    with (released / name).open("ab") as file:
        file.write(b" ")
    assert_one_sentence(verify(released), 3, name)


@pytest.mark.parametrize("text", ["{}", "[]", '{"name": "web app"}', '{"files": []}', '{"files": {"a": 1}}'])
def test_verify_folder_with_a_manifest_of_something_else_is_refused(released, text):
    (released / "manifest.json").write_text(text)
    assert_one_sentence(verify(released), 3, "manifest.json")


def test_verify_signature_is_of_the_owner_of_the_key(released, tmp_path):
    private, public = keys(tmp_path, "mine")
    sign(released, private)
    result = verify(released, "--key", public)
    assert result.exit_code == 0, result.stderr
    assert f"signed by the owner of {public}" in result.stdout
    assert_one_sentence(verify(released, "--key", keys(tmp_path, "theirs")[1]), 3, "is not what was signed")


def test_verify_release_that_was_not_signed_is_refused_with_a_key(released, tmp_path):
    assert_one_sentence(verify(released, "--key", keys(tmp_path, "mine")[1]), 3, "is not signed")


def test_verify_what_is_no_folder_or_no_key_is_wrong_usage(released, tmp_path):
    assert_one_sentence(verify(tmp_path / "none"), 2, "is no folder")
    assert_one_sentence(verify(released, "--key", tmp_path / "none"), 2, "give the public key")
