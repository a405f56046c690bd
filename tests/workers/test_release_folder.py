"""What lies in a release beside its weights: bill of materials, signature, card, and the repaired adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import EvalResult, ModelCardData
from peft import PeftModel

from tests.interchange import CLOSE, linears, load, logits, small
from tests.models import make_base
from workers.adapter import read_adapter, write_adapter
from workers.bom import BOM
from workers.manifest import MANIFEST, publish_folder, verify_folder
from workers.signature import check_signature
from workers.task import run
from workers.types import BadInput, ExportTask

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_base(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapter = small(1, linears(load(base_dir)), r=4, lora_alpha=6, use_rslora=True, ranks={Q: 2})
    with publish_folder(folder, {"base_digest": "d1"}) as scratch:
        write_adapter(replace(adapter, base_model=str(base_dir)), scratch)
    return folder


@pytest.fixture
def task(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> ExportTask:
    out = str(tmp_path / "release")
    return ExportTask(
        str(adapter_dir), str(base_dir), False, out, (("README.md", CARD),), name="tiny.support/3"
    )


def a_card() -> str:
    args = {"confidence_interval_95": [0.85, 0.91]}
    result = EvalResult(
        task_type="text-classification",
        dataset_type="finance.test",
        dataset_name="sentiment",
        metric_type="macro_f1",
        metric_value=0.88,
        metric_args=args,
    )
    data = ModelCardData(library_name="peft", model_name="tiny.support", eval_results=[result])
    return f"---\n{data}\n---\n\n# tiny.support\n"


CARD = a_card()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(private, public), in PEM."""
    folder, key = tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "private.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)
    return folder / "private.pem", folder / "public.pem"


# ---- bill of materials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_release_bill_is_a_valid_cyclonedx_ml_bom_of_every_file(task: ExportTask, merged: bool) -> None:
    done = run(replace(task, merged=merged))
    text = (Path(done["out_dir"]) / BOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    listed = {part["name"]: part["hashes"][0]["content"] for part in bill["components"]}
    assert listed == {name: digest for name, digest in done["files"].items() if name != BOM}
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == (
        "machine-learning-model",
        "tiny.support",
        "3",
    )
    (metric,) = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert (metric["type"], metric["value"]) == ("macro_f1", "0.88")
    assert metric["confidenceInterval"] == {"lowerBound": "0.85", "upperBound": "0.91"}


def test_release_equal_releases_have_equal_bytes(task: ExportTask, tmp_path: Path) -> None:
    first = run(task)["files"]
    assert run(replace(task, out_dir=str(tmp_path / "again")))["files"] == first


# ---- signature ------------------------------------------------------------------------------------------


def test_release_signed_is_verified_with_the_public_key_and_stays_a_whole_folder(
    task: ExportTask, keys: tuple[Path, Path]
) -> None:
    out = Path(run(replace(task, signing_key=str(keys[0])))["out_dir"])
    check_signature(out, keys[1])
    verify_folder(out)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", MANIFEST, "README.md"])
def test_release_signed_and_then_altered_is_found_out(
    task: ExportTask, keys: tuple[Path, Path], name: str
) -> None:
    out = Path(run(replace(task, signing_key=str(keys[0])))["out_dir"])
    with (out / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BadInput, match="is not what was signed"):
        check_signature(out, keys[1])


def test_release_signed_and_given_another_file_is_found_out(
    task: ExportTask, keys: tuple[Path, Path]
) -> None:
    out = Path(run(replace(task, signing_key=str(keys[0])))["out_dir"])
    (out / "evil.py").write_text("print()")
    with pytest.raises(BadInput, match="is not what was signed"):
        check_signature(out, keys[1])


def test_release_moved_signature_still_holds(
    task: ExportTask, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    out = Path(run(replace(task, signing_key=str(keys[0])))["out_dir"])
    check_signature(shutil.copytree(out, tmp_path / "elsewhere"), keys[1])


@pytest.mark.parametrize("kind", ["text", "rsa"])
def test_release_key_of_another_kind_is_refused(task: ExportTask, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(b"no key" if kind == "text" else _rsa_key())
    with pytest.raises(BadInput, match=r"key\.pem: no signature can be made with it"):
        run(replace(task, signing_key=str(key)))
    assert not Path(task.out_dir).exists()


def _rsa_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# ---- card and repair ------------------------------------------------------------------------------------


def test_release_card_says_which_server_would_misread_it_and_how_the_others_serve_it(
    task: ExportTask,
) -> None:
    done = run(task)
    card = (Path(done["out_dir"]) / "README.md").read_text()
    assert {obstacle["server"] for obstacle in done["obstacles"]} == {"vLLM", "SGLang", "llama.cpp"}
    assert "- SGLang would not serve it as it was scored: it would scale module" in card
    assert "vllm serve" not in card


def test_release_repaired_gives_the_same_logits_in_peft_and_no_server_minds(
    task: ExportTask, base_dir: Path, adapter_dir: Path
) -> None:
    done = run(replace(task, repair=True))
    out = Path(done["out_dir"])
    fixed = read_adapter(out)
    assert done["obstacles"] == []
    assert (fixed.r, fixed.lora_alpha, fixed.use_rslora, fixed.rank_pattern) == (4, 4, False, {})
    before = logits(PeftModel.from_pretrained(load(base_dir), adapter_dir))
    after = logits(PeftModel.from_pretrained(load(base_dir), out))
    assert torch.allclose(after, before, rtol=0, atol=CLOSE)
    card = (out / "README.md").read_text()
    assert f"vllm serve {base_dir} --enable-lora --max-lora-rank 8" in card
