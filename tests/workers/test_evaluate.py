"""Scores of a tiny random model: equal to those of the plain way, for every task and number of ranks."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import make_base, write_rows
from tests.numerics.pair import two_ranks
from workers import choices, generate, head, score
from workers.base import load_base
from workers.data import encode
from workers.evaluate import Candidate, evaluate, evaluate_together
from workers.ranks import Ranks
from workers.reading import Reader
from workers.types import BadInput, BaseSpec, DatasetSpec, EvaluationReport, EvaluationSpec

CPU = torch.device("cpu")
LABELS = ("negative", "neutral", "up")
WORDS = ("gain", "fall", "rise", "bank", "loss", "oil", "gold", "海", "euro", "cuts", "beat", "miss")


def phrase(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def make_rows(kind: str, count: int) -> list[dict[str, Any]]:
    draw = random.Random(kind)
    return [_row(kind, draw) for _ in range(count)]


def _row(kind: str, draw: random.Random) -> dict[str, Any]:
    if kind == "classification":
        return {"text": phrase(draw, 6), "label": draw.choice(LABELS)}
    if kind == "chat":
        roles = ("user", "assistant") * draw.randint(1, 3)
        return {"messages": [{"role": role, "content": phrase(draw, 4)} for role in roles]}
    candidates = sorted({phrase(draw, 4) for _ in range(6)})
    return {"history": [phrase(draw, 3)], "candidates": candidates, "target": draw.choice(candidates)}


def evaluation_of(folder: Path, kind: str, count: int = 12) -> EvaluationSpec:
    file = write_rows(folder / f"{kind}.jsonl", make_rows(kind, count))
    labels = LABELS if kind == "classification" else ()
    spec = DatasetSpec(str(file), kind, labels=labels, instruction="Judge.")
    return EvaluationSpec((spec,), sequence_len=200, max_new_tokens=8, generate_samples=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # Large weights, so that likelihoods differ far more than rounding does.
    return make_base(tmp_path_factory.mktemp("base"), initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    head.install(model)
    return model


def plain_likelihood(plain, row) -> tuple[float, int, int]:
    """(log-likelihood, tokens, correct) of a row's labels, from one full forward pass of that row alone."""
    with torch.no_grad():
        logits_TV = plain(torch.tensor([row.input_ids])).logits[0]
    log_TV, at = (
        logits_TV.double().log_softmax(-1),
        [i for i, label in enumerate(row.labels) if label != -100],
    )
    chosen = sum(log_TV[i - 1, row.labels[i]].item() for i in at)
    return chosen, len(at), sum(int(log_TV[i - 1].argmax()) == row.labels[i] for i in at)


def plain_answers(plain, tokenizer, spec: DatasetSpec, row, field: str, answers) -> list[tuple[float, int]]:
    rows = [encode(tokenizer, spec, {**row, field: answer}, 0, 256) for answer in answers]
    return [plain_likelihood(plain, encoded)[:2] for encoded in rows]


def test_evaluate_recommendation_likelihoods_equal_those_of_whole_rows(model, plain, tokenizer, tmp_path):
    spec = evaluation_of(tmp_path, "recommendation")
    report = evaluate(model, tokenizer, Ranks(), spec, CPU)
    losses, tokens, hits = 0.0, 0, 0
    for row, prediction in zip(make_rows("recommendation", 12), report.predictions, strict=True):
        expected = plain_answers(plain, tokenizer, spec.datasets[0], row, "target", row["candidates"])
        found = prediction["log_likelihoods"]
        assert [found[title] for title in row["candidates"]] == pytest.approx(
            [e[0] for e in expected], rel=1e-5
        )
        order = sorted(zip(expected, row["candidates"], strict=True), reverse=True)
        assert prediction["predicted"] == order[0][1]
        assert order[prediction["rank"] - 1][1] == row["target"]
        value, count = expected[row["candidates"].index(row["target"])]
        losses, tokens, hits = losses - value, tokens + count, hits + (order[0][1] == row["target"])
    assert report.metrics["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert report.metrics["hit_at_1"] == pytest.approx(hits / 12)
    assert report.rows == 12


def test_evaluate_classification_probabilities_equal_those_of_whole_rows(model, plain, tokenizer, tmp_path):
    spec = evaluation_of(tmp_path, "classification")
    report = evaluate(model, tokenizer, Ranks(), spec, CPU)
    for row, prediction in zip(make_rows("classification", 12), report.predictions, strict=True):
        expected = plain_answers(plain, tokenizer, spec.datasets[0], row, "label", LABELS)
        shares = torch.tensor([e[0] for e in expected], dtype=torch.float64).softmax(0).tolist()
        assert prediction["probabilities"] == pytest.approx(dict(zip(LABELS, shares, strict=True)), abs=1e-4)
        assert prediction["predicted"] == LABELS[shares.index(max(shares))]
    right = sum(p["label"] == p["predicted"] for p in report.predictions)
    assert report.metrics["accuracy"] == right / 12
    assert sum(report.confusion[i][i] for i in range(3)) == right
    assert report.labels == LABELS


def test_evaluate_chat_loss_and_accuracy_equal_those_of_whole_rows(model, plain, tokenizer, tmp_path):
    spec = evaluation_of(tmp_path, "chat")
    report = evaluate(model, tokenizer, Ranks(), spec, CPU)
    rows = [encode(tokenizer, spec.datasets[0], row, 0, 200) for row in make_rows("chat", 12)]
    values, tokens, correct = zip(*(plain_likelihood(plain, row) for row in rows), strict=True)
    loss = -sum(values) / sum(tokens)
    assert report.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert report.metrics["token_accuracy"] == sum(correct) / sum(tokens)
    assert len(report.predictions) == 5


def test_evaluate_chat_replies_are_those_of_stepwise_decoding(model, plain, tokenizer, tmp_path):
    spec = evaluation_of(tmp_path, "chat")
    report = evaluate(model, tokenizer, Ranks(), spec, CPU)
    for row, prediction in zip(make_rows("chat", 5), report.predictions, strict=True):
        turns = [{"role": "system", "content": "Judge."}, *row["messages"]]
        text = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 8 and tokenizer.eos_token_id not in ids[start:]:
            with torch.no_grad():
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        assert prediction["reply"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert prediction["reference"] == turns[-1]["content"]
        assert prediction["prompt"].startswith("system: Judge.\nuser: ")


def test_evaluate_chat_without_generated_samples_reports_likelihoods_alone(model, tokenizer, tmp_path):
    spec = replace(evaluation_of(tmp_path, "chat"), generate_samples=0)
    report = evaluate(model, tokenizer, Ranks(), spec, CPU)
    assert set(report.metrics) == {"loss", "perplexity", "token_accuracy"}
    assert report.predictions == ()


@pytest.mark.parametrize("kind", ["chat", "classification", "recommendation"])
def test_evaluate_many_small_passes_give_the_report_of_one(model, tokenizer, tmp_path, monkeypatch, kind):
    spec = evaluation_of(tmp_path, kind)
    large = evaluate(model, tokenizer, Ranks(), spec, CPU)
    monkeypatch.setattr(score, "TOKENS_PER_PASS", 150)  # cuts between rows and between a row's answers
    monkeypatch.setattr(score, "LOGITS_PER_PASS", 259 * 20)
    monkeypatch.setattr(generate, "TOKENS_PER_PASS", 250)
    small = evaluate(model, tokenizer, Ranks(), spec, CPU)
    assert small.metrics == pytest.approx(large.metrics, rel=1e-5)
    assert [p.get("reply") for p in small.predictions] == [p.get("reply") for p in large.predictions]


def test_evaluate_sliding_window_model_gives_each_answer_its_own_row(tokenizer, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=259, num_key_value_heads=2, sliding_window=24, initializer_range=0.3, **sizes
    )
    windowed = MistralForCausalLM(config).eval()
    rows = make_rows("recommendation", 3)
    spec = evaluation_of(tmp_path, "recommendation", 3)
    answers = [
        plain_answers(windowed, tokenizer, spec.datasets[0], row, "target", row["candidates"]) for row in rows
    ]
    head.install(windowed)
    report = evaluate(windowed, tokenizer, Ranks(), spec, CPU)
    for row, prediction, expected in zip(rows, report.predictions, answers, strict=True):
        found = [prediction["log_likelihoods"][title] for title in row["candidates"]]
        assert found == pytest.approx([e[0] for e in expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["chat", "classification", "recommendation"])
def test_evaluate_report_is_json_values_only(model, tokenizer, tmp_path, kind):
    report = evaluate(model, tokenizer, Ranks(), evaluation_of(tmp_path, kind), CPU)
    text = json.dumps([report.metrics, report.predictions, report.confusion], allow_nan=False)
    assert json.loads(text)[0] == report.metrics


# ---- several ranks ----------------------------------------------------------------------------------


def report_on(ranks: Ranks, folder: str, zero: str, specs: list[EvaluationSpec]) -> list[EvaluationReport]:
    """Small passes, so that ranks have several each and one rank is a pass short."""
    score.TOKENS_PER_PASS, generate.TOKENS_PER_PASS = 600, 250
    try:
        base = load_base(BaseSpec(folder, zero=zero), ranks)
        reports = [evaluate(base.model, base.tokenizer, ranks, spec, base.device) for spec in specs]
        assert ranks.gather(reports) == [reports] * ranks.world_size
        return reports
    finally:
        score.TOKENS_PER_PASS = generate.TOKENS_PER_PASS = 4096


@pytest.mark.parametrize("zero", ["none", "3"])
def test_evaluate_two_ranks_give_the_report_of_one(folder, tmp_path, zero):
    specs = [evaluation_of(tmp_path, kind) for kind in ("chat", "recommendation", "classification")]
    alone = report_on(Ranks(), str(folder), "none", specs)
    together = two_ranks(report_on, str(folder), zero, specs)
    for one, two in zip(alone, together, strict=True):
        assert two.metrics == pytest.approx(one.metrics, rel=1e-6)
        assert [{**p, "log_likelihoods": 0, "probabilities": 0} for p in two.predictions] == [
            {**p, "log_likelihoods": 0, "probabilities": 0} for p in one.predictions
        ]


def replies_on(ranks: Ranks, folder: str, zero: str, stop_ids: list[int]) -> list[list[int]]:
    base = load_base(BaseSpec(folder, zero=zero), ranks)
    prompts = [list(range(20, 20 + length)) for length in (12, 11, 10, 9, 8)]
    generate.TOKENS_PER_PASS = 45  # two prompts a batch, and a lone one at the end
    try:
        reader = Reader(base.model, ranks, base.device, 0)
        (replies,) = generate.greedy_replies(reader, [generate.Asked(None, prompts, 10, tuple(stop_ids))])
        return replies
    finally:
        generate.TOKENS_PER_PASS = 4096


def test_greedy_replies_ranks_that_stop_at_different_lengths_agree_with_one(folder):
    whole = replies_on(Ranks(), str(folder), "none", [2])
    stop = [2, whole[0][2], whole[4][1]]
    alone = replies_on(Ranks(), str(folder), "none", stop)
    assert alone == [reply[: next((i for i, t in enumerate(reply) if t in stop), 10)] for reply in whole]
    assert len({len(reply) for reply in alone}) > 1
    assert two_ranks(replies_on, str(folder), "3", stop) == alone


def bad_row_on_one_rank(ranks: Ranks, folder: str, files: list[str]) -> str:
    base = load_base(BaseSpec(folder, zero="none"), ranks)
    spec = DatasetSpec(files[ranks.rank], "classification", labels=LABELS)
    try:
        evaluate(base.model, base.tokenizer, ranks, EvaluationSpec((spec,), 200), base.device)
    except BadInput as error:
        return str(error)
    return "no error"


def test_evaluate_row_bad_on_one_rank_alone_is_refused_on_all(folder, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", make_rows("classification", 4))
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "Up", "label": "sideways"}])
    message = two_ranks(bad_row_on_one_rank, str(folder), [str(good), str(bad)])
    assert "bad.jsonl:1: unknown label 'sideways'" in message


def unforeseen_on_one_rank(
    ranks: Ranks, folder: str, specs: list[EvaluationSpec], module: str, name: str, fails: int
) -> list[str]:
    """Why each has no report, or "". What is named raises on rank `fails`."""
    base = load_base(BaseSpec(folder, zero="none"), ranks)

    def fail(*_: Any) -> Any:
        raise KeyError("unforeseen")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == fails:
            patch.setattr(f"{module}.{name}", fail)
        reader = Reader(base.model, ranks, base.device, 0)
        reports = evaluate_together(reader, base.tokenizer, [Candidate(None, spec) for spec in specs])
    found = [str(report) if isinstance(report, BadInput) else "" for report in reports]
    assert ranks.gather(found) == [found, found]
    return found


@pytest.mark.parametrize(
    ("module", "name", "fails"),
    [
        ("workers.questions", "encode_choices", 1),
        ("workers.questions", "encode_choices", 0),
        ("workers.metrics", "ranking_rows", 0),  # the one rank that asks for it
    ],
)
def test_evaluate_what_is_unforeseen_on_one_rank_refuses_that_candidate_alone_on_all(
    folder, tmp_path, module, name, fails
):
    specs = [evaluation_of(tmp_path, kind, 4) for kind in ("chat", "recommendation", "chat")]
    found = two_ranks(unforeseen_on_one_rank, str(folder), specs, module, name, fails)
    assert found[0] == found[2] == ""
    assert "it cannot be scored (KeyError: 'unforeseen')" in found[1]


def test_evaluate_recommendation_of_a_lone_candidate_has_a_report(model, tokenizer, tmp_path):
    rows = [{"history": ["gain"], "candidates": [title], "target": title} for title in ("fall", "rise")]
    spec = DatasetSpec(str(write_rows(tmp_path / "lone.jsonl", rows)), "recommendation")
    report = evaluate(model, tokenizer, Ranks(), EvaluationSpec((spec,), 200), CPU)
    assert {report.metrics[name] for name in ("hit_at_1", "ndcg_at_5", "mrr")} == {1.0}


def test_encode_choices_without_control_tokens_gives_the_same_tokens(tokenizer, tmp_path, monkeypatch):
    """A control token is as far back as one must look; one may look as far back as the row's beginning."""
    rows, (spec,) = make_rows("recommendation", 4), evaluation_of(tmp_path, "recommendation", 4).datasets
    expected = choices.encode_choices(tokenizer, spec, rows, 200)
    monkeypatch.setattr(choices, "control_tokens", lambda _: ())
    assert choices.encode_choices(tokenizer, spec, rows, 200) == expected


# ---- refusals ---------------------------------------------------------------------------------------


def test_evaluate_without_data_sets_is_refused(model, tokenizer):
    with pytest.raises(BadInput, match="it names no data set"):
        evaluate(model, tokenizer, Ranks(), EvaluationSpec((), 200), CPU)


def test_evaluate_data_sets_of_two_tasks_are_refused(model, tokenizer, tmp_path):
    specs = [evaluation_of(tmp_path, kind) for kind in ("chat", "classification")]
    both = EvaluationSpec((specs[0].datasets[0], specs[1].datasets[0]), 200)
    with pytest.raises(BadInput, match=r"classification\.jsonl differs from .*chat\.jsonl in type or labels"):
        evaluate(model, tokenizer, Ranks(), both, CPU)


def test_evaluate_reply_longer_than_sequence_len_is_refused(model, tokenizer, tmp_path):
    spec = replace(evaluation_of(tmp_path, "chat"), max_new_tokens=200)
    with pytest.raises(BadInput, match=r"evaluation\.max_new_tokens: 200 leaves no room"):
        evaluate(model, tokenizer, Ranks(), spec, CPU)


@pytest.mark.parametrize("kind", ["chat", "classification", "recommendation"])
def test_evaluate_model_gone_to_nan_is_refused(model, tokenizer, tmp_path, kind):
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(BadInput, match="the scores are not finite numbers: the adapter has diverged"):
        evaluate(model, tokenizer, Ranks(), evaluation_of(tmp_path, kind), CPU)


def test_evaluate_leaves_a_training_model_training(model, tokenizer, tmp_path):
    model.train()
    evaluate(model, tokenizer, Ranks(), evaluation_of(tmp_path, "classification"), CPU)
    assert model.training
