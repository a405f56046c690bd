"""What a loaded recipe says: aliases, paths, worker types, base, schema."""

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from orchestrator.recipe.load import load_recipe
from orchestrator.recipe.pipeline import json_schema
from orchestrator.recipe.zero_block import OffloadParam, ZeroBlock
from tests.orchestrator.recipe_files import (
    LABELS,
    finance,
    line_of,
    support,
    write_json,
    write_rows,
    write_world,
    write_yaml,
)
from workers.types import BadInput, DatasetSpec, TrainingSpec

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path)


def load(world: Path, **changes: Any) -> Any:
    return load_recipe(write_yaml(world / "recipe.yaml", finance(**changes)))


# ---- keys -----------------------------------------------------------------------------------------------


def test_recipe_aliases_are_read_as_ours_with_a_notice_each(world: Path) -> None:
    theirs = {
        "base_model": None,
        "model_name_or_path": "bases/tiny.yaml",
        "sequence_len": None,
        "cutoff_len": 64,
        "lora_rank": 4,
        "target_modules": ["q_proj"],
        "max_steps": None,
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
    }
    loaded = load(world, **theirs)
    ours = load(
        world,
        lora_r=4,
        lora_target_modules=["q_proj"],
        max_steps=None,
        num_epochs=2.0,
        lr_scheduler="linear",
    )
    assert loaded.recipe == ours.recipe
    assert ours.notices == ()
    file = write_yaml(world / "recipe.yaml", finance(**theirs))
    assert f"{file}:{line_of(file, 'lora_rank')}: 'lora_rank' is read as 'lora_r'" in loaded.notices
    assert len(loaded.notices) == 6


@pytest.mark.parametrize(
    ("theirs", "rows"),
    [
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 8}, 16),
        ({"per_device_train_batch_size": 4}, 4),
        ({"effective_batch_size": 24}, 24),
    ],
)
def test_recipe_batch_aliases_become_the_rows_of_a_step(
    world: Path, theirs: dict[str, int], rows: int
) -> None:
    loaded = load(world, **theirs)
    assert loaded.recipe.global_batch_size == rows
    assert loaded.notices


def test_recipe_lora_target_linear_is_all_linear(world: Path) -> None:
    assert load(world, lora_target_linear=True).recipe.lora_target_modules == "all-linear"


@pytest.mark.parametrize(
    "twice",
    [
        {"lora_r": 8, "lora_rank": 8},
        {"micro_batch_size": 2, "global_batch_size": 4},
        {"micro_batch_size": 0},
    ],
)
def test_recipe_alias_that_contradicts_or_makes_no_sense_is_refused(
    world: Path, twice: dict[str, int]
) -> None:
    with pytest.raises(BadInput, match=r"recipe\.yaml:\d+: "):
        load(world, **twice)


def test_recipe_plain_words_and_numbers_are_read_as_people_mean_them(world: Path) -> None:
    for split in ("train", "validation", "test"):
        write_rows(world / "data" / "yesno" / f"{split}.jsonl", [{"text": "x", "label": "no"}])
    text = yaml.safe_dump(finance(datasets=None, learning_rate=None))
    text += "learning_rate: 2e-3\n"
    text += "datasets: [{path: data/yesno, type: classification, labels: [yes, no]}]\n"
    (world / "recipe.yaml").write_text(text)
    recipe = load_recipe(world / "recipe.yaml").recipe
    assert recipe.learning_rate == 0.002
    assert recipe.datasets[0].labels == ("yes", "no")


@pytest.mark.parametrize(("word", "number"), [("low", 25), ("normal", 50), ("high", 75), (90, 90)])
def test_recipe_priority_is_a_number(world: Path, word: Any, number: int) -> None:
    assert load(world, schedule={"priority": word}).recipe.schedule.priority == number


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("6h", 21600), ("2d", 172800), (5, 5)]
)
def test_recipe_duration_is_seconds(world: Path, text: Any, seconds: int) -> None:
    assert load(world, schedule={"max_duration": text}).recipe.schedule.max_duration == seconds


# ---- what it asks of a host -----------------------------------------------------------------------------


def test_recipe_job_spec_carries_every_hyperparameter(world: Path) -> None:
    values = {
        "learning_rate": 0.003,
        "global_batch_size": 6,
        "sequence_len": 48,
        "max_steps": 7,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 2.0,
        "evals_per_epoch": 3,
        "saves_per_epoch": 4,
        "max_bad_steps": 5,
        "seed": 6,
    }
    lora = {"lora_r": 4, "lora_alpha": 5.0, "lora_dropout": 0.2, "use_rslora": True}
    recipe = load(world, **values, **lora, lora_target_modules=["v_proj", "q_proj", "q_proj"]).recipe
    spec = recipe.job_spec("j", 2, "/ckpt")
    assert (spec.job, spec.attempt, spec.checkpoint_dir) == ("j", 2, "/ckpt")
    assert spec.training == TrainingSpec(**values, num_epochs=None)
    assert (spec.adapter.r, spec.adapter.lora_alpha, spec.adapter.lora_dropout) == (4, 5.0, 0.2)
    assert (spec.adapter.use_rslora, spec.adapter.target_modules) == (True, ("q_proj", "v_proj"))


def test_recipe_folder_of_three_splits_has_three_roles(world: Path) -> None:
    recipe = load(world).recipe
    spec = recipe.job_spec("j", 0, "")
    data = str(world / "data" / "finance")
    assert spec.train == (DatasetSpec(data, "classification", "train", tuple(LABELS)),)
    assert spec.validation == (DatasetSpec(data, "classification", "validation", tuple(LABELS)),)
    assert recipe.evaluation_spec().datasets == (DatasetSpec(data, "classification", "test", tuple(LABELS)),)


def test_recipe_data_set_with_a_split_has_that_role_alone(world: Path) -> None:
    datasets = [
        {**finance()["datasets"][0], "path": f"data/finance/{split}.jsonl", "split": role}
        for split, role in (("train", "train"), ("test", "train"), ("validation", "test"))
    ]
    loaded = load(world, datasets=datasets, evals_per_epoch=0)
    assert (loaded.train.rows, loaded.validation.rows, loaded.test.rows) == (14, 0, 4)
    assert [Path(spec.path).stem for spec in loaded.recipe.datasets_of("train")] == ["train", "test"]


def test_recipe_read_from_another_folder_finds_the_same_files(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(world / "recipe.yaml", finance())
    monkeypatch.chdir(world / "data")
    loaded = load_recipe(Path("../recipe.yaml"))
    assert loaded.recipe.datasets_of("train")[0].path == str(world / "data" / "finance")
    assert loaded.base.spec.path == str(world / "bases" / "tiny")


# ---- base -----------------------------------------------------------------------------------------------


def test_base_file_says_how_a_host_holds_the_model(world: Path) -> None:
    keys = {"model": "tiny", "zero": 3, "slots": 3, "deepspeed": {"stage3_prefetch_bucket_size": 5}}
    write_yaml(world / "bases" / "other.yaml", {**keys, "world_size": 4, "tokens_per_tick": 99})
    loaded = load(world, base_model="bases/other.yaml")
    spec = loaded.base.spec
    assert (spec.zero, spec.slots, spec.tokens_per_tick) == ("3", 3, 99)
    assert spec.deepspeed == {"stage3_prefetch_bucket_size": 5}
    assert (loaded.world_size, loaded.registered_name) == (4, "other.finance-sentiment")
    assert load(world, resources={"world_size": 1}).world_size == 1


def test_base_file_budget_is_measured_unless_a_number_is_given(world: Path) -> None:
    write_yaml(world / "bases" / "other.yaml", {"model": "tiny", "chunk_tokens": 512})
    spec = load(world, base_model="bases/other.yaml").base.spec
    assert (spec.tokens_per_tick, spec.chunk_tokens) == ("auto", 512)


def test_base_file_deepspeed_block_reaches_the_host_as_deepspeed_reads_it(world: Path) -> None:
    block = {
        "offload_param": {"device": "nvme", "nvme_path": "/mnt/fast", "pin_memory": False},
        "zero_hpz_partition_size": 4,
        "zero_quantized_weights": True,
    }
    write_yaml(world / "bases" / "other.yaml", {"model": "tiny", "deepspeed": block})
    assert load(world, base_model="bases/other.yaml").base.spec.deepspeed == block


def test_base_file_deepspeed_keys_are_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    theirs = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZeroBlock.model_fields) <= theirs
    assert set(OffloadParam.model_fields) <= set(DeepSpeedZeroOffloadParamConfig.model_fields)
    everything = {
        name: True if bool in get_args(field.annotation) else 2
        for name, field in ZeroBlock.model_fields.items()
        if name != "offload_param"
    }
    offload = {"device": "cpu", "pin_memory": False, "buffer_count": 1, "buffer_size": 1, "max_in_cpu": 1}
    block = ZeroBlock.model_validate({**everything, "offload_param": offload}).given()
    assert block == {**everything, "offload_param": offload}
    DeepSpeedZeroConfig(**block)


@pytest.mark.parametrize(("priority", "weight"), [("low", 25), ("normal", 50), ("high", 75), (7, 7), (0, 1)])
def test_recipe_priority_is_the_jobs_weight_in_a_tick(world: Path, priority: Any, weight: int) -> None:
    recipe = load(world, schedule={"priority": priority}).recipe
    assert recipe.job_spec("j", 1, "c").weight == weight


def test_base_folder_named_without_a_base_file_takes_defaults(world: Path) -> None:
    loaded = load(world, base_model="bases/tiny")
    assert (loaded.base.spec.dtype, loaded.world_size, loaded.base.slug) == ("float32", 1, "tiny")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": "tiny", "slot": 2}, r"other\.yaml:2: unknown key 'slot'; did you mean 'slots'\?"),
        ({"model": "tiny", "dtype": "int8"}, r"other\.yaml:2: dtype should be"),
        ({"model": "none"}, r"other\.yaml:1: 'none' is neither a folder beside the file nor"),
        ({"model": "tiny", "revision": "main"}, r"other\.yaml:2: a revision belongs to a hub id"),
        ({"dtype": "float32"}, r"other\.yaml:1: key 'model' is missing"),
        (
            {"model": "tiny", "deepspeed": {"stage3_prefetch_bucket": 1}},
            r"other\.yaml:3: unknown key 'deepspeed\.stage3_prefetch_bucket'; "
            r"did you mean 'stage3_prefetch_bucket_size'\?",
        ),
        (
            {"model": "tiny", "deepspeed": {"offload_param": {"devices": "cpu"}}},
            r"unknown key 'deepspeed\.offload_param\.devices'; did you mean 'device'\?",
        ),
        (
            {"model": "tiny", "deepspeed": {"offload_param": {"device": "nvme"}}},
            r"deepspeed\.offload_param: device nvme needs an nvme_path",
        ),
        ({"model": "tiny", "load_in_4bit": True}, r"load_in_4bit needs zero: none"),
        ({"model": "tiny", "tokens_per_tick": "most"}, r"tokens_per_tick: should be auto or a whole number"),
        ({"model": "tiny", "tokens_per_tick": 0}, r"tokens_per_tick: should be auto or a whole number"),
        (
            {"model": "tiny", "attention": "flash"},
            r"attention should be 'sdpa', 'eager', 'flash_attention_2' or 'varlen'",
        ),
    ],
)
def test_base_file_with_a_mistake_is_refused(world: Path, keys: dict[str, Any], words: str) -> None:
    write_yaml(world / "bases" / "other.yaml", keys)
    with pytest.raises(BadInput, match=words):
        load(world, base_model="bases/other.yaml")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "is not a model"),
        ("config.json", "{", "not readable JSON"),
        ("model.safetensors", None, "weights are read from safetensors only"),
        ("model.safetensors", "xx", "not a safetensors file"),
        ("model.safetensors", "x" * 100, "not a safetensors file"),
        ("chat_template.jinja", None, "has no chat template"),
    ],
)
def test_base_folder_that_is_not_whole_is_refused(
    world: Path, file: str, content: str | None, words: str
) -> None:
    path = world / "bases" / "tiny" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=words):
        load(world)


def test_base_from_the_local_hub_cache_is_found_by_id(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = world / "hub" / "models--Acme--Tiny-1B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (world / "bases" / "tiny").rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "hub"))
    loaded = load(world, base_model="Acme/Tiny-1B")
    assert (loaded.base.slug, loaded.base.spec.name) == ("tiny-1b", "Acme/Tiny-1B")
    assert loaded.recipe.canonical()["base_model"] == "Acme/Tiny-1B"


def test_base_digests_change_with_the_bytes_they_cover(world: Path) -> None:
    folder = world / "bases" / "tiny"
    before = load(world).base.digests
    write_json(folder / "tokenizer.json", {"version": "1.1"})
    after_tokenizer = load(world).base.digests
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    after_template = load(world).base.digests
    assert after_tokenizer.tokenizer != before.tokenizer
    assert after_tokenizer.weights == after_template.weights == before.weights
    assert before.chat_template == after_tokenizer.chat_template != after_template.chat_template


def test_base_chat_template_has_one_digest_wherever_it_is_stored(world: Path) -> None:
    folder = world / "bases" / "tiny"
    before = load(world).base.digests.chat_template
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", {"chat_template": template})
    assert load(world).base.digests.chat_template == before


def test_base_sharded_weights_are_read_through_their_index(world: Path) -> None:
    whole = load(world).base
    folder = world / "bases" / "tiny"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    sharded = load(world).base
    assert (sharded.linears, sharded.parameters) == (whole.linears, whole.parameters)
    (folder / "b.safetensors").unlink()
    with pytest.raises(BadInput, match=r"b\.safetensors is missing"):
        load(world)


def test_base_linears_leave_out_embedding_head_and_norm(world: Path) -> None:
    folder = world / "bases" / "tiny"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    base = load(world).base
    assert base.module_names() == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert len(base.linears) == 12
    assert base.linears["model.layers.0.mlp.gate_proj"] == (12, 8)


def test_recipe_schema_file_is_fresh() -> None:
    expected = json.dumps(json_schema(), indent=2) + "\n"
    assert (RECIPES / "schema.json").read_text() == expected, "write it again: chorus recipe schema"


@pytest.mark.parametrize("name", ["demo", "support", "finance", "recommendation"])
def test_recipe_schema_accepts_the_recipes_we_ship(name: str) -> None:
    jsonschema.validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), json_schema())


@pytest.mark.parametrize(
    "changes", [{"lora_rnk": 8}, {"lora_r": 0}, {"name": None}, {"evaluation": {"gate": {}}}]
)
def test_recipe_schema_refuses_what_the_loader_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(finance(**changes), json_schema())


def test_recipe_schema_accepts_every_word_the_loader_accepts() -> None:
    schedule = {"priority": "high", "max_duration": "6h"}
    jsonschema.validate(support(schedule=schedule, lora_target_modules=["q_proj"]), json_schema())
