"""Rows in tokens: what is learned, what is cut, what is refused, under several kinds of chat template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tests.models import byte_tokenizer, write_rows
from workers.choices import encode_choices
from workers.data import encode, encode_all, read_rows
from workers.types import BadInput, DatasetSpec

LABELS = ("negative", "neutral", "positive")
CHAT = DatasetSpec("-", "chat")
TURNS = [
    {"role": "user", "content": "Two teas, please."},
    {"role": "assistant", "content": "With milk?"},
    {"role": "user", "content": "No."},
    {"role": "assistant", "content": "Coming — 好的！"},
]
INSTRUCT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
)
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REVERSING_TEMPLATE = "{% for m in messages | reverse %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
STRICT_TEMPLATE = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}x"


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row.labels if label != -100])


def test_encode_chat_learns_every_assistant_turn_and_its_end():
    tokenizer = byte_tokenizer()
    row = encode(tokenizer, CHAT, {"messages": TURNS}, 3, 256)
    assert row.sample == 3
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert learned(tokenizer, row) == "With milk?<|im_end|>Coming — 好的！<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4), st.booleans())
def test_encode_chat_any_text_is_learned_whole_and_nothing_else(exchanges, trim_offsets):
    tokenizer = byte_tokenizer()
    # GPT-2's and Llama 3's tokenizers leave a token's leading space out of its offsets.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    turns = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    row = encode(tokenizer, CHAT, {"messages": turns}, 0, 4096)
    expected = "".join(f"{answer}<|im_end|>" for _, answer in exchanges)
    assert learned(tokenizer, row) == expected


def test_encode_chat_that_the_assistant_opens_learns_its_greeting():
    tokenizer = byte_tokenizer()
    row = encode(tokenizer, CHAT, {"messages": [{"role": "assistant", "content": "a"}, TURNS[0]]}, 0, 256)
    assert learned(tokenizer, row) == "a<|im_end|>"
    assert row.labels[len("<assistant\n")] != -100


def test_encode_template_without_generation_prompt_learns_content_and_end():
    tokenizer = with_template(INSTRUCT_TEMPLATE)
    row = encode(tokenizer, CHAT, {"messages": TURNS}, 0, 256)
    assert learned(tokenizer, row) == " With milk?<|im_end|> Coming — 好的！<|im_end|>"


def test_encode_template_that_marks_only_the_last_turn_learns_both():
    tokenizer = with_template(THINKING_TEMPLATE)
    row = encode(tokenizer, CHAT, {"messages": TURNS}, 0, 256)
    assert learned(tokenizer, row) == "With milk?<|im_end|><think>\n\n</think>\n\nComing — 好的！<|im_end|>"


def test_encode_template_that_does_not_append_is_refused():
    with pytest.raises(BadInput, match="row 5: the base's chat template renders the beginning"):
        encode(with_template(REVERSING_TEMPLATE), CHAT, {"messages": TURNS}, 5, 256)


def test_encode_template_that_raises_is_refused_with_its_words():
    with pytest.raises(BadInput, match="cannot render the row: one message only"):
        encode(with_template(STRICT_TEMPLATE), CHAT, {"messages": TURNS}, 0, 256)


def test_encode_base_without_template_is_refused():
    with pytest.raises(BadInput, match="the base's chat template cannot render the row"):
        encode(with_template(None), CHAT, {"messages": TURNS}, 0, 256)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_encode_control_token_in_a_message_is_refused(token):
    turns = [{"role": "user", "content": f"Hi{token}there"}, TURNS[1]]
    with pytest.raises(
        BadInput, match=r"row 0: the user message holds the control token <\|.*\|>; take it out"
    ):
        encode(byte_tokenizer(), CHAT, {"messages": turns}, 0, 256)


def test_encode_long_chat_is_cut_at_the_end():
    tokenizer = byte_tokenizer()
    whole = encode(tokenizer, CHAT, {"messages": TURNS}, 0, 256)
    cut = encode(tokenizer, CHAT, {"messages": TURNS}, 0, 50)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:50], whole.labels[:50])


def test_encode_chat_without_target_left_names_sequence_len():
    with pytest.raises(
        BadInput, match=r"none of the assistant's tokens is among the first 20 of \d+; raise seq"
    ):
        encode(byte_tokenizer(), CHAT, {"messages": TURNS}, 0, 20)


def test_encode_all_long_classification_row_names_file_line_and_lengths(tmp_path):
    rows = [{"text": "Up", "label": "positive"}, {"text": "Up" * 40, "label": "positive"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    spec = DatasetSpec(str(file), "classification", labels=LABELS)
    with pytest.raises(
        BadInput, match=r"rows\.jsonl:2: the row has 109 tokens; raise sequence_len, which is 64"
    ):
        encode_all(byte_tokenizer(), [spec], 64)


def test_encode_all_counts_samples_over_all_data_sets(tmp_path):
    tokenizer = byte_tokenizer()
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    news = write_rows(tmp_path / "news.jsonl", [{"text": "Up", "label": "positive"}])
    specs = [DatasetSpec(str(chat), "chat"), DatasetSpec(str(news), "classification", labels=LABELS)]
    rows = encode_all(tokenizer, specs, 256)
    assert [row.sample for row in rows] == [0, 1, 2]
    assert learned(tokenizer, rows[2]) == "positive<|im_end|>"
    assert rows[1] == encode(tokenizer, specs[0], {"messages": TURNS[:2]}, 1, 256)


@pytest.mark.parametrize("template", [None, INSTRUCT_TEMPLATE, THINKING_TEMPLATE])
def test_encode_choices_are_the_tokens_that_training_would_see(tmp_path, template):
    tokenizer = with_template(template or byte_tokenizer().chat_template)
    candidates = ["Wave", "海 边", "Oven 2"]
    row = {"history": ["Sea"], "candidates": candidates, "target": "Wave"}
    spec = DatasetSpec(str(write_rows(tmp_path / "rows.jsonl", [row])), "recommendation")
    [choice] = encode_choices(tokenizer, spec, read_rows(spec), 256)
    for candidate, answer in zip(candidates, choice.answers, strict=True):
        trained = encode(tokenizer, spec, {**row, "target": candidate}, 0, 256)
        assert trained.input_ids[: len(choice.prompt) + len(answer)] == choice.prompt + answer
        assert tuple(label for label in trained.labels if label != -100) == answer


def test_encode_choices_candidate_that_does_not_fit_names_the_line(tmp_path):
    row = {"history": ["Sea"], "candidates": ["Wave", "W" * 60], "target": "Wave"}
    spec = DatasetSpec(str(write_rows(tmp_path / "rows.jsonl", [row])), "recommendation")
    with pytest.raises(
        BadInput, match=r"rows\.jsonl:1: the row has \d+ tokens with its longest answer; raise"
    ):
        encode_choices(byte_tokenizer(), spec, read_rows(spec), 80)


def test_encode_choices_control_token_in_a_candidate_is_refused(tmp_path):
    row = {"history": ["Sea"], "candidates": ["Wave", "<|im_end|>"], "target": "Wave"}
    spec = DatasetSpec(str(write_rows(tmp_path / "rows.jsonl", [row])), "recommendation")
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: the answer holds the control token"):
        encode_choices(byte_tokenizer(), spec, read_rows(spec), 256)
