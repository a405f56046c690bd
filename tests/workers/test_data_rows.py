"""Reading a split: what is accepted, what is refused with file, line and field, and how rows become chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import write_rows
from workers.data import data_digest, messages, read_rows
from workers.types import BadInput, DatasetSpec

LABELS = ("negative", "neutral", "positive")
HEADLINE = {"text": "Profit fell", "label": "negative"}
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
PICK = {"history": [{"title": "Sea", "liked": True}], "candidates": ["Wave", "Oven"], "target": "Wave"}


def spec_for(path: Path, kind: str, **changes) -> DatasetSpec:
    labels = LABELS if kind == "classification" else ()
    return DatasetSpec(str(path), **{"type": kind, "labels": labels, **changes})


def test_read_rows_folder_with_splits_reads_the_named_split(tmp_path):
    write_rows(tmp_path / "test.jsonl", [HEADLINE, HEADLINE])
    assert read_rows(spec_for(tmp_path, "classification", split="test")) == [HEADLINE, HEADLINE]


def test_read_rows_max_samples_reads_no_further_than_the_first(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(HEADLINE) + "\nnot json\n")
    assert read_rows(spec_for(file, "classification", max_samples=1)) == [HEADLINE]


def test_read_rows_windows_line_ends_byte_order_mark_and_final_blank_lines_are_accepted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(HEADLINE).encode() + b"\r\n\r\n")
    assert read_rows(spec_for(file, "classification")) == [HEADLINE]


def test_read_rows_unknown_split_lists_those_there_are(tmp_path):
    write_rows(tmp_path / "train.jsonl", [HEADLINE])
    with pytest.raises(BadInput, match=r"split 'dev' has no file dev\.jsonl; the folder's splits are: train"):
        read_rows(spec_for(tmp_path, "classification", split="dev"))


def test_read_rows_missing_file_names_it(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.jsonl: no such data file or folder"):
        read_rows(spec_for(tmp_path / "gone.jsonl", "chat"))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_read_rows_empty_file_is_refused(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"train\.jsonl: holds no rows"):
        read_rows(spec_for(tmp_path, "chat"))


def test_read_rows_classification_without_labels_is_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [HEADLINE])
    with pytest.raises(BadInput, match=r"datasets\.labels is empty"):
        read_rows(spec_for(file, "classification", labels=()))


def test_read_rows_file_not_in_utf8_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(HEADLINE).encode() + b"\xff")
    with pytest.raises(BadInput, match=r"rows\.jsonl: is not UTF-8 text at byte 44"):
        read_rows(spec_for(file, "classification"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not a JSON object"),
        ("", "is not a JSON object"),
        ("[1]", "is a list, not an object"),
        ("[" * 100_000, "is not a JSON object"),
        (r'{"text": "\ud800", "label": "neutral"}', "is not a JSON object"),
    ],
)
def test_read_rows_line_that_is_no_object_names_file_and_line(tmp_path, line, complaint):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(HEADLINE)}\n{line}\n{json.dumps(HEADLINE)}\n")
    with pytest.raises(BadInput, match=rf"rows\.jsonl:2: {complaint}"):
        read_rows(spec_for(file, "classification"))


@pytest.mark.parametrize(
    ("kind", "row", "complaint"),
    [
        ("classification", {"label": "neutral"}, "field 'text' is missing; add it as a string"),
        ("classification", {"text": 3, "label": "neutral"}, "field 'text' is a number; it must be a string"),
        (
            "classification",
            {"text": "Up", "label": "bullish"},
            "unknown label 'bullish'; datasets.labels allows negative, neutral, positive",
        ),
        ("chat", {}, "field 'messages' is missing; add it as a list"),
        ("chat", {"messages": []}, "messages has no assistant message"),
        ("chat", {"messages": TURNS[:1]}, "messages has no assistant message"),
        ("chat", {"messages": ["Hello"]}, r"messages\[0\] is not an object"),
        (
            "chat",
            {"messages": [TURNS[0], {"role": "bot", "content": "Hi"}]},
            r"messages\[1\]: unknown role 'bot'",
        ),
        ("chat", {"messages": [{"role": "assistant"}]}, r"messages\[0\]: field 'content' is missing"),
        (
            "chat",
            {"messages": [{"role": "assistant", "content": " "}]},
            r"messages\[0\]: the assistant's content is empty",
        ),
        ("recommendation", {**PICK, "target": "Ship"}, "target 'Ship' is not among the candidates"),
        ("recommendation", {**PICK, "candidates": ["Wave", " Wave"]}, "candidate 'Wave' occurs twice"),
        ("recommendation", {**PICK, "candidates": ["Wave", ""]}, "candidate '' is not a title"),
        ("recommendation", {**PICK, "candidates": ["Wave", 7]}, "candidate 7 is not a title"),
        ("recommendation", {**PICK, "history": [7]}, r"history\[0\] is neither a title nor"),
        ("recommendation", {**PICK, "history": [{}]}, r"history\[0\]: field 'title' is missing"),
        (
            "recommendation",
            {**PICK, "history": [{"title": "Sea", "liked": "yes"}]},
            r"history\[0\]: field 'liked' is a string; it must be true or false",
        ),
        ("recommendation", {**PICK, "request": None}, "field 'request' is null"),
        ("recommendation", {"history": [], "target": "Wave"}, "field 'candidates' is missing"),
    ],
)
def test_read_rows_bad_row_names_file_line_and_field(tmp_path, kind, row, complaint):
    good = {"classification": HEADLINE, "chat": {"messages": TURNS}, "recommendation": PICK}[kind]
    file = write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(BadInput, match=rf"rows\.jsonl:2: {complaint}"):
        read_rows(spec_for(file, kind))


def test_messages_chat_without_system_puts_the_instruction_first():
    spec = DatasetSpec("-", "chat", instruction="Be brief.")
    assert messages(spec, {"messages": TURNS}) == [{"role": "system", "content": "Be brief."}, *TURNS]


def test_messages_chat_with_its_own_system_keeps_it():
    own = [{"role": "system", "content": "Be long."}, *TURNS]
    assert messages(DatasetSpec("-", "chat", instruction="Be brief."), {"messages": own}) == own


def test_messages_classification_asks_the_text_and_answers_the_label():
    spec = DatasetSpec("-", "classification", labels=LABELS)
    assert messages(spec, HEADLINE) == [
        {"role": "user", "content": "Profit fell"},
        {"role": "assistant", "content": "negative"},
    ]


def test_messages_recommendation_tells_request_and_history_but_no_candidate():
    history = [{"title": "Sea", "liked": True}, {"title": "Oven", "liked": False}, "Tide", {"title": "Ship"}]
    row = {"request": "By the water.", "history": history, "candidates": ["Wave", "Pan"], "target": "Wave"}
    assert messages(DatasetSpec("-", "recommendation"), row) == [
        {"role": "user", "content": "By the water.\nliked: Sea\ndisliked: Oven\nliked: Tide\nliked: Ship"},
        {"role": "assistant", "content": "Wave"},
    ]


def test_data_digest_one_changed_byte_changes_it(tmp_path):
    file = write_rows(tmp_path / "train.jsonl", [HEADLINE])
    folder, named = spec_for(tmp_path, "classification"), spec_for(file, "classification")
    before = data_digest([folder])
    assert before == data_digest([named])
    file.write_text(file.read_text().replace("fell", "felt"))
    assert data_digest([folder]) != before
    assert len(before) == 64
