"""Signing a release folder with OpenSSF's `model-signing`, and checking it. The package is optional.

The signature is a file of its own in the folder and is over every other one, the manifest included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.manifest import SIGNATURE, CorruptFolder
from workers.types import BadInput


def check_key(key: Path) -> None:
    """Raises BadInput if `key` is no elliptic-curve private key in PEM, or the package is missing."""
    _library()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    advice = "give an EC private key in PEM, without a password"
    try:
        found = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{key}: no signature can be made with it ({error}); {advice}") from error
    if not isinstance(found, EllipticCurvePrivateKey):
        raise BadInput(f"{key}: no signature can be made with it, it is not of an elliptic curve; {advice}")


def sign(folder: Path, key: Path) -> None:
    """Write `model.sig` with an elliptic-curve private key in PEM (`check_key`), whole or not at all."""
    from model_signing import signing

    scratch = folder / f".{SIGNATURE}"
    scratch.unlink(missing_ok=True)
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(_hashing(folder)).sign(folder, scratch)
    scratch.rename(folder / SIGNATURE)


def check_signature(folder: Path, key: Path) -> None:
    """Raises CorruptFolder if `folder` is not what the owner of the public key signed, BadInput without the
    package."""
    _library()
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        raise CorruptFolder(f"{folder} is not signed: it holds no {SIGNATURE}")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_hashing(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CorruptFolder(f"{folder} is not what was signed for {key}: {reason}") from error


def _hashing(folder: Path) -> Any:
    from model_signing import hashing

    ignored = [folder / SIGNATURE, folder / f".{SIGNATURE}"]
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=ignored, ignore_git_paths=True)


def _library() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise BadInput("to sign a release, install the package: pip install 'chorus-lora[sign]'") from error
