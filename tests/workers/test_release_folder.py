"""What lies in a release beside its weights: bill of materials, signature, card, and the repaired adapter."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from tests.interchange import CLOSE, linears, load, logits, small
from tests.models import make_base
from workers import export
from workers.adapter import read_adapter, write_adapter
from workers.bom import BOM
from workers.manifest import MANIFEST, CorruptFolder, publish_folder, verify_folder
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


def a_card(**more: str) -> str:
    args = {"confidence_interval_95": [0.85, 0.91]}
    result = EvalResult(
        task_type="text-classification",
        dataset_type="finance.test",
        dataset_name="sentiment",
        metric_type="macro_f1",
        metric_value=0.88,
        metric_args=args,
    )
    data = ModelCardData(library_name="peft", model_name="tiny.support", eval_results=[result], **more)
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
    with pytest.raises(CorruptFolder, match="is not what was signed"):
        check_signature(out, keys[1])


def test_release_signed_and_given_another_file_is_found_out(
    task: ExportTask, keys: tuple[Path, Path]
) -> None:
    out = Path(run(replace(task, signing_key=str(keys[0])))["out_dir"])
    (out / "evil.py").write_text("print()")
    with pytest.raises(CorruptFolder, match="is not what was signed"):
        check_signature(out, keys[1])


def test_release_that_cannot_be_signed_leaves_no_folder(
    task: ExportTask, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "sign", fails)
        with pytest.raises(OSError, match="No space left"):
            run(replace(task, signing_key=str(keys[0])))
        assert not Path(task.out_dir).exists()
    run(task)
    with monkeypatch.context() as patched:
        patched.setattr(export, "sign", fails)
        with pytest.raises(OSError, match="No space left"):
            run(replace(task, signing_key=str(keys[0])))
    verify_folder(Path(task.out_dir))  # it was there before


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


def test_release_merged_cannot_be_repaired(task: ExportTask) -> None:
    with pytest.raises(BadInput, match="a merged model has no adapter to repair"):
        run(replace(task, merged=True, repair=True))
    assert not Path(task.out_dir).exists()


def test_release_merged_card_is_of_a_model_that_transformers_loads(task: ExportTask) -> None:
    text = a_card(base_model="org/tiny", base_model_relation="adapter")
    text += "\n## Loading\n\nfrom peft import PeftModel\n\n## Limits\n\n- few rows\n"
    done = run(replace(task, merged=True, dtype="bfloat16", extra_files=(("README.md", text),)))
    card = ModelCard.load(Path(done["out_dir"]) / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("macro_f1", 0.88)
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert "PeftModel" not in card.text
    assert "- few rows" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    loaded: dict[str, Any] = {}
    with chdir(done["out_dir"]):
        exec(code, loaded)
    assert loaded["model"].dtype == torch.bfloat16
    assert len(loaded["tokenizer"]) == loaded["model"].config.vocab_size


def test_release_card_of_a_base_without_an_id_names_no_folder_of_this_machine(
    task: ExportTask, base_dir: Path, tmp_path: Path
) -> None:
    with publish_folder(tmp_path / "local", {"base_digest": "d1"}) as scratch:
        adapter = small(1, linears(load(base_dir)), r=4, lora_alpha=8)
        write_adapter(replace(adapter, base_model="tiny"), scratch)
    done = run(replace(task, adapter_dir=str(tmp_path / "local")))
    card = (Path(done["out_dir"]) / "README.md").read_text()
    assert 'vllm serve "$BASE" --enable-lora' in card
    assert str(base_dir) not in card
    assert f"vllm serve {base_dir} --enable-lora" in done["commands"]["vLLM"]


def test_release_repaired_from_above_vllms_ranks_says_what_was_lost(
    task: ExportTask, base_dir: Path, tmp_path: Path
) -> None:
    with publish_folder(tmp_path / "wide", {"base_digest": "d1"}) as scratch:
        write_adapter(small(1, {"lm_head": (259, 32)}, r=520, lora_alpha=520), scratch)
    done = run(replace(task, adapter_dir=str(tmp_path / "wide"), repair=True))
    assert read_adapter(Path(done["out_dir"])).r == 512
    # Of a layer of 259 x 32 no rank above 32 holds anything more.
    assert 0 <= done["lost"] < 1e-6
