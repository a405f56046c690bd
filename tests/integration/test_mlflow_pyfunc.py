"""A registered version, loaded by MLflow alone, answers by task what plain PEFT answers."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.contracts import Scores
from orchestrator.recipe.base_file import load_base
from orchestrator.recipe.file import Place
from orchestrator.registry.card import card
from tests.contract.samples import LABELS, fresh_name, new_version, shared_server
from tests.interchange import linears, small
from tests.models import make_base
from workers.adapter import write_adapter
from workers.manifest import CorruptFolder, publish_folder
from workers.types import BadInput, DatasetSpec, EvaluationReport, EvaluationSpec

QUESTION = {"messages": [{"role": "user", "content": "Where is my parcel?"}]}
HEADLINE = {"text": "Profit rose by a tenth"}
READER = {"history": ["A Sea Story"], "candidates": ["Gold", "The Bank", "Oil and Water"]}
DIGITS = 1e-4


def task(kind: str) -> EvaluationSpec:
    labels = LABELS if kind == "classification" else ()
    return EvaluationSpec((DatasetSpec("/gone", kind, "test", labels, "Judge."),), 200, max_new_tokens=8)  # type: ignore[arg-type]


TASKS = {"support": task("chat"), "sentiment": task("classification"), "books": task("recommendation")}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", initializer_range=0.3)


@pytest.fixture(scope="module")
def plain(base_dir):
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter_dir(plain, base_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapter = small(3, linears(plain), r=4, lora_alpha=8)
    with publish_folder(folder) as scratch:
        write_adapter(replace(adapter, base_model="tiny"), scratch)
    return folder


@pytest.fixture(scope="module")
def registry():
    from orchestrator.registry.registry import MlflowRegistry

    mlflow.set_tracking_uri(shared_server().url)
    yield MlflowRegistry(shared_server().url)
    mlflow.set_tracking_uri(None)


def registered(registry, folder, base_dir, adapter_dir, **changes):
    digest = load_base(str(base_dir), Place(base_dir, 1)).digests.all
    tags = {"base.digest": digest, "base.name": "tiny", "base.dtype": "float32"}
    new = new_version(registry, folder, fresh_name(), tags=tags, **{"tasks": TASKS, **changes})
    return registry.register(replace(new, adapter_dir=adapter_dir))


@pytest.fixture(scope="module")
def version(registry, tmp_path_factory, base_dir, adapter_dir):
    return registered(registry, tmp_path_factory.mktemp("new"), base_dir, adapter_dir)


@pytest.fixture(scope="module")
def model(version, base_dir):
    return loaded(version, base_dir)


def loaded(version, base_dir):
    return mlflow.pyfunc.load_model(
        f"models:/{version.name}/{version.version}", model_config={"base": str(base_dir)}
    )


def prompt(tokenizer, text: str) -> str:
    turns = [{"role": "system", "content": "Judge."}, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def log_likelihood(model, tokenizer, text: str, answer: str) -> float:
    """Of `answer` and the end of the turn behind the prompt, one plain forward pass."""
    before = tokenizer(prompt(tokenizer, text), add_special_tokens=False)["input_ids"]
    ids = before + tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


def test_pyfunc_version_answers_each_task_as_plain_peft_does(model, base_dir, adapter_dir, plain):
    reply, label, ranking = model.predict([QUESTION, HEADLINE, READER])
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), adapter_dir
    ).eval()

    logs = torch.tensor([log_likelihood(peft, tokenizer, HEADLINE["text"], word) for word in LABELS])
    shares = dict(zip(LABELS, logs.softmax(0).tolist(), strict=True))
    assert label["probabilities"] == pytest.approx(shares, abs=DIGITS)
    assert label["label"] == max(shares, key=shares.__getitem__)
    alone = [log_likelihood(plain, tokenizer, HEADLINE["text"], word) for word in LABELS]
    assert not torch.allclose(torch.tensor(alone), logs, atol=10 * DIGITS), "the adapter says nothing"

    expected = {
        title: log_likelihood(peft, tokenizer, "liked: A Sea Story", title) for title in READER["candidates"]
    }
    assert ranking["log_likelihoods"] == pytest.approx(expected, abs=100 * DIGITS)
    assert ranking["ranking"] == sorted(expected, key=expected.__getitem__, reverse=True)

    ids = tokenizer(prompt(tokenizer, "Where is my parcel?"), add_special_tokens=False, return_tensors="pt")
    out = peft.generate(
        **ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == {"reply": text.strip()}


def test_pyfunc_data_frame_of_two_tasks_is_answered_in_its_order(model):
    rows = [HEADLINE, READER, {"text": "Loss widens"}]
    found = model.predict(pandas.DataFrame(rows))
    assert ["label" in found[0], "ranking" in found[1], "label" in found[2]] == [True] * 3
    assert found[:2] == model.predict(rows[:2])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 7}, "sentiment, row 1: field 'text' is a number; it must be a string"),
        ({"words": "?"}, "row 1: its fields do not tell its task; add 'task'"),
        ({"text": "x", "task": "weather"}, "row 1: no task 'weather'"),
        ({"history": [], "candidates": []}, "books, row 1: target '' is not among the candidates"),
        ({"messages": []}, "support, row 1: messages has no assistant message"),
    ],
)
def test_pyfunc_row_that_cannot_be_answered_is_named(model, row, words):
    with pytest.raises(BadInput, match=words):
        model.predict([row])


def test_card_says_how_to_load_it_in_words_that_run(
    registry, tmp_path, base_dir, adapter_dir, monkeypatch, capsys
):
    kinds = {"support": "chat", "sentiment": "classification", "books": "recommendation"}
    scores = [
        Scores(task, "x/test.jsonl", "d" * 64, EvaluationReport(kind, {"loss": 1.0}, 1, ()))
        for task, kind in kinds.items()
    ]
    new = registered(registry, tmp_path, base_dir, adapter_dir)
    text = card(name=new.name, base_model=str(base_dir), scores=scores)
    registry.promote(new.name, new.version, None, "first", {})
    with_peft, from_registry = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(adapter_dir)
    found = {}
    exec(with_peft, found)
    adapted = found["model"].peft_config["default"].target_modules
    assert "q_proj" in {module.rpartition(".")[2] for module in adapted}
    capsys.readouterr()
    exec(from_registry, {})
    answers = ast.literal_eval(capsys.readouterr().out)
    assert [next(iter(answer)) for answer in answers] == ["reply", "label", "ranking"]


def test_pyfunc_other_base_is_refused(version, tmp_path):
    other = make_base(tmp_path / "other", initializer_range=0.1)
    with pytest.raises(BadInput, match="is not the base that this version was trained on"):
        loaded(version, other)


def test_pyfunc_without_a_base_says_how_to_name_one(version):
    with pytest.raises(BadInput, match=r"no base to put the version on; give its folder: load_model"):
        mlflow.pyfunc.load_model(f"models:/{version.name}/1")


def test_pyfunc_altered_weights_are_not_served(registry, tmp_path, base_dir, adapter_dir):
    version = registered(registry, tmp_path, base_dir, adapter_dir)
    store = shared_server().home / "mlflow"
    path = next(p for p in store.rglob("adapter_model.safetensors") if version.model_id in str(p))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptFolder, match=r"adapter_model\.safetensors"):
        loaded(version, base_dir)


def test_register_same_tasks_twice_stages_the_same_bytes_without_a_path(
    registry, tmp_path, version, base_dir, adapter_dir
):
    again = registered(registry, tmp_path, base_dir, adapter_dir)
    for name in ("MLmodel", "answers.json"):
        text = registry.read_text(version, name)
        assert text == registry.read_text(again, name)
        assert "/gone" not in text
