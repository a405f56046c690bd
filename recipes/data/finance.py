"""Finance headlines with three labels, decided by how the words are put together and not by which occur.

What decides: which way a figure moved, a negation, a comparison with what was expected, and which clause of
two carries the weight. "Rose" is good news and "rose less than expected" is bad; "fell" is bad news and "did
not fall" is good. Most words occur under every label, so that counting them says little.
"""

import random
from collections.abc import Callable

LABELS = ("negative", "neutral", "positive")
COMPANIES = {
    "train": ("Alder", "Baxter", "Calder", "Dunmore", "Eastman", "Fenton", "Garnet", "Holland", "Ingram"),
    "validation": ("Jasper", "Kendal", "Lambert"),
    "test": ("Marlow", "Norwood", "Osborne", "Parker"),
}
SECTORS = ("Bank", "Foods", "Mills", "Motors", "Paper", "Power", "Rail", "Steel", "Stores", "Timber")
FIGURES = ("profit", "sales", "income", "orders", "trade")
UP = (("rose", "rise"), ("grew", "grow"))
DOWN = (("fell", "fall"), ("dropped", "drop"))
PERIODS = ("in March", "in June", "in the first quarter", "in the third quarter", "last year", "this spring")
EXPECTED = ("expected", "planned")
DAYS = ("on Monday", "on Tuesday", "on Friday", "today")

Clause = tuple[str, str, str]
"""(figure, past tense, infinitive)"""


def row(split: str, rng: random.Random) -> dict:
    """One headline of `split`, whose companies occur in no other split: `{"text", "label"}`."""
    sign = rng.choice((-1, 0, 1))
    makers, weights = zip(*(SIGNED if sign else NEUTRAL), strict=True)
    text = rng.choices(makers, weights)[0](sign, rng)
    company = f"{rng.choice(COMPANIES[split])} {rng.choice(SECTORS)}"
    return {"text": f"{company}: {text}", "label": LABELS[sign + 1]}


def clause(sign: int, rng: random.Random) -> Clause:
    """A figure that moved so that the news is good (+1) or bad (-1)."""
    past, infinitive = rng.choice(UP if sign > 0 else DOWN)
    return rng.choice(FIGURES), past, infinitive


def percent(rng: random.Random) -> str:
    return rng.choice(("", f" {rng.randint(2, 19)}%"))


def plain(sign: int, rng: random.Random) -> str:
    figure, past, _ = clause(sign, rng)
    said = rng.choice(("", "", f"says {rng.choice(DAYS)} that "))
    return f"{said}{figure} {past}{percent(rng)} {rng.choice(PERIODS)}"


def more_than_expected(sign: int, rng: random.Random) -> str:
    figure, past, _ = clause(sign, rng)
    return f"{figure} {past} more than {rng.choice(EXPECTED)} {rng.choice(PERIODS)}"


def less_than_expected(sign: int, rng: random.Random) -> str:
    """A good move that disappoints, or a bad one that relieves."""
    figure, past, _ = clause(-sign, rng)
    return f"{figure} {past} less than {rng.choice(EXPECTED)} {rng.choice(PERIODS)}"


def denied(sign: int, rng: random.Random) -> str:
    figure, _, infinitive = clause(-sign, rng)
    return f"{figure} did not {infinitive} {rng.choice(PERIODS)}{rng.choice((', it says', ''))}"


def although(sign: int, rng: random.Random) -> str:
    """The clause after "although" gives way to the other one, wherever it stands."""
    figure, past, _ = clause(sign, rng)
    other, other_past, _ = clause(-sign, rng)
    word = rng.choice(("although", "even though"))
    if rng.random() < 0.5:
        return f"{word} {other} {other_past}, {figure} {past}{percent(rng)}"
    return f"{figure} {past}{percent(rng)}, {word} {other} {other_past}"


def but(sign: int, rng: random.Random) -> str:
    """The clause after "but" is the one that counts."""
    figure, past, _ = clause(sign, rng)
    other, other_past, _ = clause(-sign, rng)
    return f"{other} {other_past}{percent(rng)}, but {figure} {past}"


def as_expected(_sign: int, rng: random.Random) -> str:
    figure, past, _ = clause(rng.choice((-1, 1)), rng)
    word = rng.choice(("as", "no more and no less than"))
    return f"{figure} {past}{percent(rng)}, {word} {rng.choice(EXPECTED)}"


def asked(_sign: int, rng: random.Random) -> str:
    figure, past, _ = clause(rng.choice((-1, 1)), rng)
    return f"says {rng.choice(DAYS)} whether {figure} {past} {rng.choice(PERIODS)}"


def unmoved(_sign: int, rng: random.Random) -> str:
    figure = rng.choice(FIGURES)
    (_, first), (_, second) = rng.choice(UP), rng.choice(DOWN)
    pair = [first, second] if rng.random() < 0.5 else [second, first]
    return f"{figure} did not {pair[0]} and did not {pair[1]} {rng.choice(PERIODS)}"


def balanced(_sign: int, rng: random.Random) -> str:
    """Two pieces of news that cancel."""
    sign = rng.choice((-1, 1))
    figure, past, _ = clause(sign, rng)
    other, other_past, _ = clause(-sign, rng)
    return f"{figure} {past} and {other} {other_past}, and neither counts more"


# How often each wording is used. Wordings that turn a move round come as often as those that do not.
SIGNED: tuple[tuple[Callable[[int, random.Random], str], int], ...] = (
    (plain, 3),
    (more_than_expected, 3),
    (less_than_expected, 5),
    (denied, 5),
    (although, 1),
    (but, 2),
)
NEUTRAL: tuple[tuple[Callable[[int, random.Random], str], int], ...] = (
    (as_expected, 4),
    (asked, 3),
    (unmoved, 2),
    (balanced, 1),
)
