"""Each refusal is one sentence that names file, line and key, and says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.recipe.load import load_recipe
from tests.orchestrator.recipe_files import (
    finance,
    line_of,
    support,
    write_json,
    write_rows,
    write_world,
    write_yaml,
)
from workers.types import BadInput


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path)


def refused(world: Path, recipe: dict[str, Any], at: str) -> str:
    """The sentence that refuses `recipe`, checked to name the file and the line that holds `at`."""
    file = write_yaml(world / "recipe.yaml", recipe)
    with pytest.raises(BadInput) as error:
        load_recipe(file)
    sentence = str(error.value)
    assert sentence.startswith(f"{file}:{line_of(file, at)}: "), sentence
    assert "\n" not in sentence
    return sentence


# ---- keys and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("lora_rnk", "lora_r"), ("learning_rat", "learning_rate"), ("Sequence_Len", "sequence_len")],
)
def test_recipe_misspelt_key_names_the_nearest(world: Path, misspelt: str, meant: str) -> None:
    sentence = refused(world, finance(**{misspelt: 8}), at=misspelt)
    assert f"unknown key {misspelt!r}; did you mean {meant!r}?" in sentence


def test_recipe_misspelt_nested_key_names_path_and_nearest(world: Path) -> None:
    sentence = refused(world, finance(evaluation={"gate": {}}), at="gate:")
    assert "unknown key 'evaluation.gate'; did you mean 'gates'?" in sentence


def test_recipe_misspelt_dataset_key_names_index_and_nearest(world: Path) -> None:
    datasets = [{**finance()["datasets"][0], "lables": ["x"]}]
    sentence = refused(world, finance(datasets=datasets), at="lables")
    assert "unknown key 'datasets[0].lables'; did you mean 'labels'?" in sentence


def test_recipe_key_of_another_trainer_says_where_it_belongs(world: Path) -> None:
    assert "the base file says it, as dtype" in refused(world, finance(bf16=True), at="bf16")


def test_recipe_unknown_key_like_nothing_lists_the_keys(world: Path) -> None:
    sentence = refused(world, finance(zzzzzz=1), at="zzzzzz")
    assert "the keys here are version, name, task" in sentence


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lora_r", 0, "lora_r should be greater than or equal to 1, found 0"),
        ("lora_r", True, "lora_r: should be a number, found True"),
        ("lora_r", 2.5, "lora_r should be a valid integer"),
        ("lora_dropout", 1.0, "lora_dropout should be less than 1, found 1.0"),
        ("learning_rate", "fast", "learning_rate should be a valid number"),
        ("learning_rate", float("nan"), "learning_rate should be a "),
        ("lr_scheduler", "warp", "lr_scheduler should be 'constant', 'linear' or 'cosine', found 'warp'"),
        ("version", 2, "version should be 1, found 2"),
        ("task", "Finance Sentiment", "task "),
        ("lora_target_modules", "q_proj", "should be all-linear or a list of module names"),
        ("name", "a/b", "name "),
        ("use_rslora", "perhaps", "use_rslora should be a valid boolean"),
    ],
)
def test_recipe_wrong_value_names_key_and_found(world: Path, key: str, value: Any, words: str) -> None:
    assert words in refused(world, finance(**{key: value}), at=f"{key}:")


@pytest.mark.parametrize(
    ("value", "words"),
    [("soon", "low, normal, high or a number"), (101, "less than or equal to 100"), (True, "a number")],
)
def test_recipe_wrong_priority_says_what_is_allowed(world: Path, value: Any, words: str) -> None:
    assert words in refused(world, finance(schedule={"priority": value}), at="priority")


def test_recipe_wrong_duration_shows_how_to_write_it(world: Path) -> None:
    assert "90s, 30m, 6h or 2d" in refused(world, finance(schedule={"max_duration": "long"}), at="max_dur")


def test_recipe_missing_key_is_named(world: Path) -> None:
    assert "key 'task' is missing" in refused(world, finance(task=None), at="version")


@pytest.mark.parametrize("lengths", [{"max_steps": None}, {"num_epochs": 2}])
def test_recipe_without_exactly_one_length_is_refused(world: Path, lengths: dict[str, Any]) -> None:
    assert "exactly one of num_epochs and max_steps" in refused(world, finance(**lengths), at="version")


def test_recipe_two_mistakes_reports_unknown_key_first_and_counts(world: Path) -> None:
    sentence = refused(world, finance(lora_r=-1, lora_alfa=3), at="lora_alfa")
    assert "did you mean 'lora_alpha'?" in sentence
    assert sentence.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("evaluation", "at", "words"),
    [
        ({"gates": {"macro_f2": ">= 0.8"}}, "macro_f2", "did you mean 'macro_f1'"),
        ({"gates": {"hit_at_1": ">= 0.8"}}, "hit_at_1", "is not measured here"),
        ({"gates": {"macro_f1": "0.8"}}, "macro_f1", "write an operator and a number"),
        ({"gates": {"macro_f1": 0.8}}, "macro_f1", "write an operator and a number"),
        ({"gates": {"macro_f1": "<= 0.8"}}, "macro_f1", "better when higher"),
        ({"gates": {"loss": ">= 0.8"}}, "loss", "better when lower"),
        ({"champion_margin": {"f1": 0.1}}, "f1", "it has accuracy, loss, macro_f1"),
        ({"champion_margin": {"macro_f1": -0.1}}, "macro_f1", "greater than or equal to 0"),
    ],
)
def test_recipe_gate_that_cannot_be_judged_is_refused(
    world: Path, evaluation: dict[str, Any], at: str, words: str
) -> None:
    assert words in refused(world, finance(evaluation=evaluation), at=f"{at}:")


def test_recipe_gate_on_replies_that_are_not_generated_is_refused(world: Path) -> None:
    evaluation = {"gates": {"rouge_l": ">= 0.2"}, "generate_samples": 0}
    assert "'rouge_l' is not measured here" in refused(world, support(evaluation=evaluation), at="rouge_l")


# ---- base -----------------------------------------------------------------------------------------------


def test_recipe_longer_than_the_base_allows_names_the_limit(world: Path) -> None:
    sentence = refused(world, finance(sequence_len=129), at="sequence_len")
    assert "sequence_len 129 is longer than the base allows; its limit is 128" in sentence


def test_recipe_longer_than_the_text_part_of_the_base_allows_names_the_limit(world: Path) -> None:
    (config,) = world.rglob("config.json")
    write_json(config, {"model_type": "gemma3", "text_config": {"max_position_embeddings": 128}})
    sentence = refused(world, finance(sequence_len=129), at="sequence_len")
    assert "sequence_len 129 is longer than the base allows; its limit is 128" in sentence


def test_recipe_target_module_that_matches_nothing_lists_what_there_is(world: Path) -> None:
    sentence = refused(world, finance(lora_target_modules=["q_proj", "query"]), at="- query")
    assert "'query' matches no linear layer of the base" in sentence
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, v_proj" in sentence


@pytest.mark.parametrize("target", ["embed_tokens", "norm", "proj"])
def test_recipe_target_that_is_no_linear_layer_is_refused(world: Path, target: str) -> None:
    assert "matches no linear layer" in refused(
        world, finance(lora_target_modules=[target]), at=f"- {target}"
    )


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("bases/huge.yaml", "no such base file"),
        ("./bases/huge", "no such model folder"),
        ("data/finance", "holds no config.json, so it is not a model"),
        ("nobody/no-such-model", "nor a model in the local Hugging Face cache"),
        ("no such//name", "nor a model in the local Hugging Face cache"),
    ],
)
def test_recipe_base_that_is_not_there_is_refused(world: Path, reference: str, words: str) -> None:
    assert words in refused(world, finance(base_model=reference), at="base_model")


# ---- data -----------------------------------------------------------------------------------------------


def test_recipe_missing_data_is_named(world: Path) -> None:
    datasets = [{**finance()["datasets"][0], "path": "data/finanse"}]
    sentence = refused(world, finance(datasets=datasets), at="data/finanse")
    assert f"datasets[0].path: {world / 'data' / 'finanse'}: no such data file or folder" in sentence


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_recipe_missing_split_is_named(world: Path, split: str) -> None:
    (world / "data" / "finance" / f"{split}.jsonl").unlink()
    assert f"split '{split}' has no file {split}.jsonl" in refused(world, finance(), at="data/finance")


def test_recipe_without_test_rows_says_which_split_is_wanted(world: Path) -> None:
    dataset = finance()["datasets"][0]
    datasets = [{**dataset, "path": f"data/finance/{s}.jsonl", "split": s} for s in ("train", "validation")]
    assert "no data set has the split 'test'" in refused(world, finance(datasets=datasets), at="datasets")


def test_recipe_single_file_without_split_is_refused(world: Path) -> None:
    datasets = [{**finance()["datasets"][0], "path": "data/finance/train.jsonl"}]
    assert "needs its split" in refused(world, finance(datasets=datasets), at="- path")


@pytest.mark.parametrize(
    "dataset",
    [
        {"path": "data/finance", "type": "classification"},
        {"path": "data/support", "type": "chat", "labels": ["a"]},
    ],
)
def test_recipe_labels_are_for_classification_alone(world: Path, dataset: dict[str, Any]) -> None:
    sentence = refused(world, finance(datasets=[dataset]), at="- path")
    assert "labels are needed for type classification, and only there" in sentence


def test_recipe_of_two_types_is_refused(world: Path) -> None:
    datasets = [*finance()["datasets"], *support()["datasets"]]
    assert "one type and the same labels" in refused(world, finance(datasets=datasets), at="version")


RECOMMENDATION = {"history": [{"title": "a", "liked": True}], "candidates": ["b", "c"], "target": "b"}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("classification", {"text": "x"}, "field 'label' is missing"),
        ("classification", {"label": "neutral"}, "field 'text' is missing"),
        ("classification", {"text": 3, "label": "neutral"}, "field 'text' is a number; it must be a string"),
        ("classification", {"text": "x", "label": "great"}, "unknown label 'great'; datasets.labels allows"),
        ("classification", ["x"], "is a list, not an object"),
        ("chat", {"message": []}, "field 'messages' is missing"),
        ("chat", {"messages": []}, "messages has no assistant message"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "messages has no assistant message"),
        (
            "chat",
            {"messages": [{"role": "assistant", "content": " "}]},
            "assistant's content is empty",
        ),
        ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "messages[0]: unknown role 'bot'"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0]: field 'content' is missing"),
        ("recommendation", {**RECOMMENDATION, "target": "d"}, "'d' is not among the candidates"),
        ("recommendation", {**RECOMMENDATION, "candidates": ["b", "b"]}, "candidate 'b' occurs twice"),
        ("recommendation", {**RECOMMENDATION, "candidates": ["b", " "]}, "candidate ' ' is not a title"),
        (
            "recommendation",
            {**RECOMMENDATION, "history": [{"liked": True}]},
            "history[0]: field 'title'",
        ),
    ],
)
def test_recipe_bad_row_names_file_line_and_field(world: Path, kind: str, row: Any, words: str) -> None:
    good = {
        "classification": {"text": "x", "label": "neutral"},
        "chat": {"messages": [{"role": "assistant", "content": "x"}]},
        "recommendation": RECOMMENDATION,
    }[kind]
    folder = world / "data" / "bad"
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [good])
    write_rows(folder / "test.jsonl", [good, good, row])
    dataset = {"path": "data/bad", "type": kind}
    if kind == "classification":
        dataset["labels"] = ["negative", "neutral"]
    file = write_yaml(world / "recipe.yaml", finance(datasets=[dataset]))
    with pytest.raises(BadInput, match=f"^{re.escape(str(folder / 'test.jsonl'))}:3: ") as error:
        load_recipe(file)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b"{'text': 1}\n", ":1: is not a JSON object"),
        (b"\xff\xfe\n", "is not UTF-8 text at byte 0"),
    ],
)
def test_recipe_unreadable_data_is_named(world: Path, content: bytes, words: str) -> None:
    file = world / "data" / "finance" / "train.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=f"^{re.escape(str(file))}") as error:
        load_recipe(write_yaml(world / "recipe.yaml", finance()))
    assert words in str(error.value)


def test_recipe_max_samples_leaves_later_rows_unread(world: Path) -> None:
    file = world / "data" / "finance" / "test.jsonl"
    file.write_text(file.read_text() + "not json\n")
    datasets = [{**finance()["datasets"][0], "max_samples": 4}]
    loaded = load_recipe(write_yaml(world / "recipe.yaml", finance(datasets=datasets)))
    assert (loaded.train.rows, loaded.test.rows) == (4, 4)


# ---- the file itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("version: 1\nname: a\nversion: 1\n", ":3: key 'version' is repeated; the first is "),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", ":1: keys and values are wanted here"),
        ("name: !!python/object/apply:os.system [ls]\n", ":1: the tag "),
        ("1: a\n", ":1: a key must be a word"),
        ("? [a]\n: b\n", ":1: the tag "),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: " + "[" * 20 + "]" * 20, ":1: nested deeper than 16 levels"),
        ("a: " + "[" * 20_000, "nested deeper than 16 levels"),
        ("a: &x [*x]\n", "nested deeper than 16 levels"),
        ("#" * 300_000, "larger than 256 KiB"),
        ("a: \x07\n", "not valid YAML"),
        ("a: !!int abc\n", ":1: 'abc' is not a int"),
    ],
)
def test_recipe_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as error:
        load_recipe(file)
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)


def test_recipe_file_of_aliases_that_multiply_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(BadInput, match="more than 10000 values once aliases are expanded"):
        load_recipe(file)


def test_recipe_file_that_is_absent_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(BadInput, match=r"binary\.yaml:2: not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        load_recipe(tmp_path)


def test_recipe_where_a_pipeline_stands_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="this is a pipeline"):
        load_recipe(write_yaml(tmp_path / "p.yaml", {"version": 1, "jobs": ["a.yaml"]}))
