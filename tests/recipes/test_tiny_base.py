"""The tiny base: small, in the usual layout, with a chat template, some English and some Chinese."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

BASE = Path(__file__).parents[2] / "recipes" / "bases" / "tiny"
# Jane Austen, Sense and Sensibility (1811), and Cao Xueqin (18th century), both kept out of training.
ENGLISH = (
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their residence was"
)
CHINESE = "那甄宝玉依命前行，贾宝玉等陪着来见王夫人．"
CHAT = [
    {"role": "system", "content": "Answer in a few words."},
    {"role": "user", "content": "Where is the ship?"},
    {"role": "assistant", "content": "In the harbour."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def test_tiny_base_folder_is_below_ten_megabytes():
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) < 10_000_000


def test_tiny_base_files_are_of_the_usual_layout():
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    expected |= {"tokenizer_config.json", "chat_template.jinja", "README.md", "loss.csv"}
    assert expected <= {file.name for file in BASE.iterdir()}
    assert not [*BASE.rglob("*.bin"), *BASE.rglob("*.pt"), *BASE.rglob("*.pkl")]


def test_tiny_base_special_tokens_are_those_of_its_model(tokenizer, model):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_tiny_base_chat_template_renders_chatml(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer in a few words.<|im_end|>\n"
        "<|im_start|>user\nWhere is the ship?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "a  b\n\n£5 – naïve 🙂"])
def test_tiny_base_tokenizer_gives_back_any_text(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tiny_base_control_tokens_and_roles_are_one_token_each(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert {"<|im_start|>", "<|im_end|>", "system", "user", "assistant"} <= set(tokens)


@pytest.mark.parametrize(("text", "share_of_uniform"), [(ENGLISH, 0.6), (CHINESE, 0.75)])
def test_tiny_base_loss_on_unseen_prose_is_far_below_uniform(
    tokenizer, model, text: str, share_of_uniform: float
):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < share_of_uniform * math.log(model.config.vocab_size)


def test_tiny_base_greedy_reply_ends_by_itself(tokenizer, model):
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Repeat the sentence."}, {"role": "user", "content": "I am here."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
    assert reply[-1] == tokenizer.eos_token_id
