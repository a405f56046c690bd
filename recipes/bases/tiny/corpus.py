"""Books to training documents: plain prose, and exercises in the chat format made from the same prose.

Owns what the tiny base reads. Nothing here comes from the sample data or from any task: every exercise (go
on with a story, answer a line of dialogue, name a missing word) is cut out of the books, so that the
special tokens, the roles and copying from the prompt are learnt before any adapter is trained.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

Messages = list[dict[str, str]]

WORD = re.compile(r"[A-Za-z]{4,}")
SENTENCE_EN = re.compile(r"(?<=[.!?])[\"'”’]?\s+(?=[\"'“‘A-Z])")
SENTENCE_ZH = re.compile(r"(?<=[。．！？])")


def chunks(folder: Path, split: str) -> list[str]:
    """The `text` of every row of `folder/<split>.jsonl`."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]


def paragraphs(chunk: str) -> list[str]:
    return [" ".join(part.split()) for part in chunk.split("\n\n") if len(part) > 20 and "-----" not in part]


def common_words(texts: list[str], size: int) -> tuple[set[str], set[str]]:
    """(the 400 most common words, the next `size`): the first are too common to carry a subject."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in WORD.findall(text):
            counts[word] = counts.get(word, 0) + 1
    ranked = [
        word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word.islower()
    ]
    return set(ranked[:400]), set(ranked[400 : 400 + size])


def exercises(texts: list[str], random_state: random.Random, chinese: bool) -> Iterator[Messages]:
    """Endless exercises over the books, in the same order for the same `random_state`."""
    split = SENTENCE_ZH if chinese else SENTENCE_EN
    kinds = ZH_KINDS if chinese else EN_KINDS
    makers, weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]
    _, subjects = common_words(texts, 6000)
    prose = [list(filter(None, (paragraphs(text)))) for text in texts]
    prose = [parts for parts in prose if len(parts) >= 2]
    while True:
        parts = random_state.choice(prose)
        start = random_state.randrange(len(parts))
        sentences = [s.strip() for s in split.split(parts[start]) if 8 <= len(s.strip()) <= 320]
        maker = random_state.choices(makers, weights)[0]
        turns = maker(parts, start, sentences, subjects, random_state)
        if turns:
            yield turns


def dialogue(system: str, *turns: str) -> Messages:
    """Turns of user and assistant in alternation, after a system message unless it is empty."""
    roles = ("user", "assistant")
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def clip(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


def speak(parts: list[str], start: int, _s: list[str], _w: set[str], rng: random.Random) -> Messages:
    """Consecutive paragraphs as the turns of a conversation."""
    length = 2 * rng.randint(1, 3)
    turns = [clip(part, 50) for part in parts[start : start + length]]
    turns = turns[: len(turns) // 2 * 2]
    return dialogue(rng.choice(["", "Talk with me.", "Answer in a few words."]), *turns) if turns else []


def go_on(_p: list[str], _i: int, sentences: list[str], _w: set[str], rng: random.Random) -> Messages:
    if len(sentences) < 2:
        return []
    at = rng.randrange(len(sentences) - 1)
    return dialogue(rng.choice(["", "Go on with the story."]), sentences[at], sentences[at + 1])


def repeat(_p: list[str], _i: int, sentences: list[str], _w: set[str], rng: random.Random) -> Messages:
    if not sentences:
        return []
    sentence = rng.choice(sentences)
    return dialogue("Repeat the sentence.", clip(sentence, 30), clip(sentence, 30))


def missing_word(
    _p: list[str], _i: int, sentences: list[str], words: set[str], rng: random.Random
) -> Messages:
    candidates = [(s, w) for s in sentences for w in WORD.findall(s) if w in words and s.count(w) == 1]
    if not candidates:
        return []
    sentence, word = rng.choice(candidates)
    return dialogue("Which word is missing?", sentence.replace(word, "___"), word)


def missing_sign(_p: list[str], _i: int, sentences: list[str], _w: set[str], rng: random.Random) -> Messages:
    if not sentences:
        return []
    sentence = rng.choice(sentences)
    at = rng.randrange(len(sentence))
    return dialogue("缺了哪个字？", sentence[:at] + "_" + sentence[at + 1 :], sentence[at])


def same_scene(parts: list[str], start: int, _s: list[str], words: set[str], rng: random.Random) -> Messages:
    """Some words of one passage as lines; the answer is another word of the same passage."""
    passage = " ".join(parts[start : start + 3])
    found = sorted({word for word in WORD.findall(passage) if word in words})
    if len(found) < 6:
        return []
    rng.shuffle(found)
    shown, answers = found[: rng.randint(3, 5)], found[5:]
    return dialogue("Name another word of the same scene.", "\n".join(shown), answers[0])


def mentioned(parts: list[str], start: int, _s: list[str], words: set[str], rng: random.Random) -> Messages:
    """A passage and two words, one of which is in it."""
    passage = clip(parts[start], 60)
    inside = sorted({word for word in WORD.findall(passage) if word in words})
    if not inside:
        return []
    answer, other = rng.choice(inside), rng.choice(sorted(words))
    if other in passage:
        return []
    pair = [answer, other] if rng.random() < 0.5 else [other, answer]
    return dialogue("Which of the two words is in the text?", f"{passage}\n{pair[0]} or {pair[1]}?", answer)


def speech_or_story(
    _p: list[str], _i: int, sentences: list[str], _w: set[str], rng: random.Random
) -> Messages:
    """Whether a sentence was printed inside quotation marks, with the marks taken away."""
    if not sentences:
        return []
    sentence = rng.choice(sentences)
    label = "speech" if re.search('["“”]', sentence) else "story"
    return dialogue("Is it speech or story?", re.sub('["“”]', "", sentence), label)


def word_order(_p: list[str], _i: int, sentences: list[str], _w: set[str], rng: random.Random) -> Messages:
    """A sentence as printed, or with its words shuffled: right or wrong."""
    if not sentences:
        return []
    words = clip(rng.choice(sentences), 25).split(" ")
    if len(words) < 4 or rng.random() < 0.5:
        return dialogue("Is the order of the words right or wrong?", " ".join(words), "right")
    at = rng.randrange(len(words) - 2)
    words[at : at + 3] = reversed(words[at : at + 3])
    return dialogue("Is the order of the words right or wrong?", " ".join(words), "wrong")


EN_KINDS = (
    (speak, 4),
    (go_on, 3),
    (repeat, 2),
    (missing_word, 3),
    (same_scene, 5),
    (mentioned, 3),
    (speech_or_story, 2),
    (word_order, 2),
)
ZH_KINDS = ((speak, 2), (go_on, 3), (repeat, 2), (missing_sign, 2))
