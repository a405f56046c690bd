"""Releases: the adapter's own bytes, or a merged model that Transformers loads with the same logits."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.recipe.base_file import load_base
from orchestrator.recipe.file import Place
from tests.faults import files_limited_to, run_killed_before_rename
from tests.interchange import CLOSE, linears, load, logits, plainly_merged, small
from tests.models import make_base
from workers.adapter import Adapter, read_adapter, write_adapter
from workers.manifest import folder_files, publish_folder, verify_folder
from workers.task import run
from workers.types import BadInput, ExportTask


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16 and in several shards, with tied embeddings."""
    folder = tmp_path_factory.mktemp("base")
    make_base(folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.bfloat16)
    model.save_pretrained(folder / "tiny", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder / "whole").save_pretrained(folder / "tiny")
    assert len(list((folder / "tiny").glob("*.safetensors"))) > 2
    return folder / "tiny"


def save(adapter: Adapter, folder: Path) -> Path:
    with publish_folder(folder, {"base_digest": "d1"}) as scratch:
        write_adapter(adapter, scratch)
    return folder


@pytest.fixture
def adapter_dir(base_dir: Path, tmp_path: Path) -> Path:
    q = "model.layers.0.self_attn.q_proj"
    adapter = small(1, linears(load(base_dir)), r=4, lora_alpha=6, use_rslora=True, ranks={q: 2})
    return save(adapter, tmp_path / "adapter")


def task(adapter_dir: Path, base_dir: Path, merged: bool, **changes: object) -> ExportTask:
    plain = ExportTask(str(adapter_dir), str(base_dir), merged, str(adapter_dir.parent / "release"))
    return replace(plain, **changes)


def test_export_merged_model_gives_the_logits_of_base_and_adapter(base_dir: Path, adapter_dir: Path) -> None:
    release = Path(run(task(adapter_dir, base_dir, True))["out_dir"])
    merged = AutoModelForCausalLM.from_pretrained(release)
    assert merged.dtype == torch.float32
    hosted = PeftModel.from_pretrained(load(base_dir), adapter_dir)
    assert float((logits(merged) - logits(hosted)).abs().max()) < CLOSE
    tokenizer = AutoTokenizer.from_pretrained(release)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        AutoTokenizer.from_pretrained(base_dir).apply_chat_template(messages, tokenize=False)
    )


def test_export_merged_model_keeps_the_shards_of_its_base(base_dir: Path, adapter_dir: Path) -> None:
    release = Path(run(task(adapter_dir, base_dir, True))["out_dir"])
    shards = {path.name: load_file(path) for path in release.glob("*.safetensors")}
    assert shards.keys() == {path.name for path in base_dir.glob("*.safetensors")}
    index = json.loads((release / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards.values() for t in s.values())


def test_export_merged_in_bfloat16_rounds_the_float32_sum_once(base_dir: Path, adapter_dir: Path) -> None:
    release = Path(run(task(adapter_dir, base_dir, True, dtype="bfloat16"))["out_dir"])
    merged = AutoModelForCausalLM.from_pretrained(release)
    assert merged.dtype == torch.bfloat16
    expected = plainly_merged(base_dir, [read_adapter(adapter_dir)], [1.0]).state_dict()
    for name, weight in merged.state_dict().items():
        # A float32 sum on the border of two bf16 numbers may go either way: one unit in the last place.
        assert torch.allclose(weight.float(), expected[name], rtol=2**-8, atol=0), name
        assert float((weight == expected[name].bfloat16()).float().mean()) > 0.999, name


def test_export_merged_adapter_on_the_tied_output_head_unties_it(base_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save(small(1, {"lm_head": (259, 32)}, lora_alpha=40), tmp_path / "head")
    run(task(adapter_dir, base_dir, True))
    release = adapter_dir.parent / "release"
    hosted = PeftModel.from_pretrained(load(base_dir), adapter_dir)
    merged = AutoModelForCausalLM.from_pretrained(release)
    assert float((logits(merged) - logits(hosted)).abs().max()) < CLOSE
    assert not merged.config.tie_word_embeddings
    embedding = load(base_dir).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.get_output_embeddings().weight, embedding)


def test_export_adapter_alone_has_the_bytes_of_its_version(base_dir: Path, adapter_dir: Path) -> None:
    card = (("README.md", "# a card\n"), ("recipe.yaml", "task: x\n"))
    done = run(task(adapter_dir, base_dir, False, extra_files=card))
    release = Path(done["out_dir"])
    for name, entry in folder_files(adapter_dir).items():
        assert done["files"][name] == entry["sha256"]
    assert (release / "README.md").read_text().startswith("# a card\n\n## Serving\n")
    assert (release / "recipe.yaml").read_text() == "task: x\n"
    assert verify_folder(release)["base_digest"] == "d1"
    hosted = PeftModel.from_pretrained(load(base_dir), release)
    expected = plainly_merged(base_dir, [read_adapter(adapter_dir)], [1.0])
    assert float((logits(hosted) - logits(expected)).abs().max()) < CLOSE


@pytest.mark.parametrize("merged", [False, True])
def test_export_same_release_again_changes_nothing(base_dir: Path, adapter_dir: Path, merged: bool) -> None:
    first = run(task(adapter_dir, base_dir, merged))
    inode = Path(first["out_dir"]).stat().st_ino
    assert run(task(adapter_dir, base_dir, merged)) == first
    assert Path(first["out_dir"]).stat().st_ino == inode
    with pytest.raises(BadInput, match="exists and is not this release"):
        run(task(adapter_dir, base_dir, not merged))


def weights_digest(base_dir: Path) -> str:
    """As the version of an adapter says it of its base."""
    return load_base(str(base_dir), Place(base_dir, 1)).digests.weights


def test_export_merged_from_the_weights_of_its_version_is_published(
    base_dir: Path, adapter_dir: Path
) -> None:
    named = {"base_digest": "d1", "base_weights": weights_digest(base_dir)}
    release = Path(run(task(adapter_dir, base_dir, True, **named))["out_dir"])
    assert verify_folder(release)["base_digest"] == "d1"


@pytest.mark.parametrize("name", ["config.json", "weights"])
def test_export_merged_from_other_weights_leaves_nothing(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, name: str
) -> None:
    """They are checked as they are merged, so that they are read once."""
    expected, other = weights_digest(base_dir), shutil.copytree(base_dir, tmp_path / "other")
    altered = next(other.glob("*.safetensors")) if name == "weights" else other / name
    data = altered.read_bytes()
    altered.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if name == "weights" else b" "))
    with pytest.raises(BadInput, match="is not the base the adapter was trained on"):
        run(task(adapter_dir, other, True, base_digest="d1", base_weights=expected))
    assert not (adapter_dir.parent / "release").exists()
    assert not list(adapter_dir.parent.glob(".release*"))


def test_export_into_a_folder_with_other_things_is_refused(base_dir: Path, adapter_dir: Path) -> None:
    (adapter_dir.parent / "release").mkdir()
    (adapter_dir.parent / "release" / "thesis.txt").write_text("all my work")
    with pytest.raises(BadInput, match="exists and is not this release"):
        run(task(adapter_dir, base_dir, True))
    assert (adapter_dir.parent / "release" / "thesis.txt").read_text() == "all my work"


def test_export_into_a_folder_with_a_manifest_of_something_else_is_refused(
    base_dir: Path, adapter_dir: Path
) -> None:
    (adapter_dir.parent / "release").mkdir()
    (adapter_dir.parent / "release" / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(BadInput, match="exists and is not this release"):
        run(task(adapter_dir, base_dir, False))


@pytest.mark.parametrize("name", ["../card.md", "config.json", "manifest.json", "x.safetensors", "a/b"])
def test_export_extra_file_that_is_not_plain_is_refused(base_dir: Path, adapter_dir: Path, name: str) -> None:
    with pytest.raises(BadInput, match="cannot be put into a release"):
        run(task(adapter_dir, base_dir, False, extra_files=((name, "text"),)))
    assert not (adapter_dir.parent / "release").exists()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"model.layers.9.self_attn.q_proj": (32, 32)},
            r"'model\.layers\.9\.self_attn\.q_proj' .* is not in",
        ),
        (
            {"model.layers.0.self_attn.q_proj": (32, 48)},
            "is 32 x 48 in the adapter but its weight is 32 x 32",
        ),
    ],
)
def test_export_adapter_of_another_base_is_refused(
    base_dir: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]], words: str, merged: bool
) -> None:
    adapter_dir = save(small(1, shapes), tmp_path / "adapter")
    with pytest.raises(BadInput, match=words):
        run(task(adapter_dir, base_dir, merged))
    assert not (tmp_path / "release").exists()


def test_export_nan_in_the_adapter_is_refused(base_dir: Path, tmp_path: Path) -> None:
    adapter = small(1, {"model.layers.0.self_attn.q_proj": (32, 32)})
    adapter.factors["model.layers.0.self_attn.q_proj"][0][0, 0] = torch.nan
    with pytest.raises(BadInput, match="holds NaN or Inf"):
        run(task(save(adapter, tmp_path / "adapter"), base_dir, True))


def test_export_base_with_a_missing_shard_is_refused(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    torn = shutil.copytree(base_dir, tmp_path / "torn")
    next(torn.glob("*.safetensors")).unlink()
    with pytest.raises(BadInput, match="is missing; copy or download the base again"):
        run(task(adapter_dir, torn, True))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_export_base_with_a_torn_index_is_refused(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, index: str, merged: bool
) -> None:
    torn = shutil.copytree(base_dir, tmp_path / "torn")
    (torn / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=r"copy or download the base again|is not in"):
        run(task(adapter_dir, torn, merged))


@pytest.mark.parametrize("merged", [False, True])
def test_export_base_with_a_torn_file_is_refused(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, merged: bool
) -> None:
    torn = shutil.copytree(base_dir, tmp_path / "torn")
    for path in torn.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="is not a whole safetensors file"):
        run(task(adapter_dir, torn, merged))
    whole = tmp_path / "single"
    make_base(whole)
    (whole / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BadInput, match="is not a whole safetensors file"):
        run(task(adapter_dir, whole, merged))


@pytest.mark.parametrize("merged", [False, True])
def test_export_base_whose_index_names_what_its_files_lack_is_refused(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, merged: bool
) -> None:
    torn = shutil.copytree(base_dir, tmp_path / "torn")
    weight = "model.layers.0.self_attn.q_proj.weight"
    for path in torn.glob("*.safetensors"):
        held = load_file(path)
        save_file({name: x for name, x in held.items() if name != weight}, path, {"format": "pt"})
    with pytest.raises(BadInput, match=f"lacks '{re.escape(weight)}'"):
        run(task(adapter_dir, torn, merged))


def test_export_merged_into_a_base_with_weights_in_eight_bits_is_refused(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    eight = shutil.copytree(base_dir, tmp_path / "eight")
    for path in eight.glob("*.safetensors"):
        held = load_file(path)
        put = {n: x.to(torch.float8_e4m3fn) if "embed_tokens" in n else x for n, x in held.items()}
        save_file(put, path, {"format": "pt"})
    with pytest.raises(BadInput, match=r"embed_tokens\.weight' is stored as F8_E4M3"):
        run(task(adapter_dir, eight, True))
    assert not (adapter_dir.parent / "release").exists()


def test_export_full_disk_raises_oserror_and_leaves_nothing(base_dir: Path, adapter_dir: Path) -> None:
    before = sorted(adapter_dir.parent.iterdir())
    with files_limited_to(10_000), pytest.raises(OSError, match="safetensors"):
        run(task(adapter_dir, base_dir, True))
    assert sorted(adapter_dir.parent.iterdir()) == before


def test_export_killed_before_publishing_is_absent_and_can_be_done_again(
    base_dir: Path, adapter_dir: Path
) -> None:
    job = task(adapter_dir, base_dir, True)
    assert run_killed_before_rename(job) == -signal.SIGKILL
    assert not Path(job.out_dir).exists()
    verify_folder(Path(run(job)["out_dir"]))
