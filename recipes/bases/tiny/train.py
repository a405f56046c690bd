"""Train the tiny base on public-domain books, from nothing, on a CPU.

    python recipes/bases/tiny/train.py --text DIR --work DIR [--steps N] [--threads N]

`--text` holds `classic_books_en` and `classic_novels_zh`, each with `train.jsonl` and `validation.jsonl`
of `{"text"}` rows. `--work` keeps the checkpoint: a run that was cut off goes on from it and ends with the
same bytes. The result is written beside this file. The learning rate is constant after the warm-up and
falls to zero over the last quarter, so a run may be given fewer steps as long as that quarter has not
begun, and is then the shorter run.
"""

import argparse
import csv
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 1
VOCABULARY, CONTEXT, BATCH = 4096, 256, 16
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, DECAY_SHARE = 3e-3, 0.1, 100, 0.25
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Shares of training tokens: English prose, Chinese prose, English chat, Chinese chat.
SHARES = (0.53, 0.13, 0.28, 0.06)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(english: list[str], chinese: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one part of Chinese to five of English by bytes gives each its share of the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\nuser\nassistant\n"] * 2000  # one token each
    tokenizer.train_from_iterator(english[::2] + chinese[::4] + roles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def prose_rows(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random
) -> Iterator[list[int]]:
    """Endless rows of CONTEXT + 1 tokens; the chunks are shuffled anew each time round."""
    ended = [[*ids, tokenizer.pad_token_id] for ids in tokenizer(texts)["input_ids"]]
    buffer: list[int] = []
    while True:
        rng.shuffle(ended)
        for ids in ended:
            buffer += ids
            while len(buffer) > CONTEXT:
                yield buffer[: CONTEXT + 1]
                del buffer[:CONTEXT]


def chat_rows(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random, chinese: bool
) -> Iterator[list[int]]:
    buffer: list[int] = []
    for messages in corpus.exercises(texts, rng, chinese):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        buffer += [*tokenizer(text)["input_ids"], tokenizer.pad_token_id]
        while len(buffer) > CONTEXT:
            yield buffer[: CONTEXT + 1]
            del buffer[:CONTEXT]


def batches(
    tokenizer: PreTrainedTokenizerFast, text_dir: Path, split: str, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches [BATCH, CONTEXT + 1], rows drawn from the four sources by SHARES."""
    english = corpus.chunks(text_dir / "classic_books_en", split)
    chinese = corpus.chunks(text_dir / "classic_novels_zh", split)
    rng = random.Random(seed)
    sources = (
        prose_rows(tokenizer, english, random.Random(seed + 1)),
        prose_rows(tokenizer, chinese, random.Random(seed + 2)),
        chat_rows(tokenizer, english, random.Random(seed + 3), chinese=False),
        chat_rows(tokenizer, chinese, random.Random(seed + 4), chinese=True),
    )
    while True:
        yield torch.tensor([next(source) for source in rng.choices(sources, SHARES, k=BATCH)])


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024, scaled to AdamW's step as in arXiv 2502.16982) for matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    decay_steps = DECAY_SHARE * steps
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay_steps)


def loss_of(model: LlamaForCausalLM, rows_bs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token. bfloat16 products are three times faster than float32 here."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_bsv = model(input_ids=rows_bs[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits_bsv.flatten(0, 1).float(), rows_bs[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, held_out: list[torch.Tensor]) -> float:
    return sum(loss_of(model, rows_bs).item() for rows_bs in held_out) / len(held_out)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Hugging Face layout, weights in bfloat16: half the size, and nothing that four layers would miss."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass
class Run:
    """What a checkpoint keeps beside the weights and the optimizers."""

    step: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    """[step, tokens, training loss since the last row, validation loss, learning rate]"""


def save(run: Run, model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], path: Path) -> None:
    """Written aside and renamed, so that a run that is killed never loses its only checkpoint."""
    states = {"model": model.state_dict(), "optimizers": [stepper.state_dict() for stepper in steppers]}
    torch.save(states | {"run": vars(run)}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def resume(model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], path: Path) -> Run:
    if not path.exists():
        return Run()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    return Run(**state["run"])


def train_step(
    model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], rows_bs: torch.Tensor, rate: float
) -> float:
    """One step of all optimizers at learning rate `rate`; the loss before it."""
    loss = loss_of(model, rows_bs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.param_groups[0]["lr"] = rate
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    english = corpus.chunks(args.text / "classic_books_en", "train")
    tokenizer = train_tokenizer(english, corpus.chunks(args.text / "classic_novels_zh", "train"))
    held_out = list(islice(batches(tokenizer, args.text, "validation", SEED + 100), 8))
    model = new_model(tokenizer)
    steppers = optimizers(model)
    run = resume(model, steppers, checkpoint)
    losses: list[float] = []
    for rows_bs in islice(batches(tokenizer, args.text, "train", SEED), run.step, args.steps):
        begun = time.monotonic()
        rate = learning_rate(run.step, args.steps)
        losses.append(train_step(model, steppers, rows_bs, rate))
        run.step += 1
        run.seconds += time.monotonic() - begun
        if run.step % 100 == 0 or run.step == args.steps:
            held = validation_loss(model, held_out)
            mean = sum(losses) / len(losses)
            tokens = run.step * BATCH * CONTEXT
            run.curve.append([run.step, tokens, round(mean, 4), round(held, 4), round(rate, 6)])
            print(*run.curve[-1], f"{run.seconds:.0f} s", flush=True)
            losses = []
            save(run, model, steppers, checkpoint)
    export(model, tokenizer, args.out)
    write_curve(run, args.out / "loss.csv")


def write_curve(run: Run, path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["step", "tokens", "train_loss", "validation_loss", "learning_rate"])
        csv.writer(file).writerows(run.curve)


if __name__ == "__main__":
    main()
