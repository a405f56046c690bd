"""Reading histories with a latent taste: a family of words that the liked titles are made of.

A title is an opening and two words of one family. The catalogue is large and titles are drawn evenly, so that
neither the popularity of a title nor which titles were liked together says much; the target's own words are
hardly ever in the history. What is to be learned is which words belong together, and whom they please.
"""

import random


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FAMILIES = {
    "sea": words("sea ship boat captain wave shore island sail coast storm"),
    "war": words("war soldier sword battle army officer gun guard camp march"),
    "kitchen": words("bread dinner supper butter cake cook meat tea wine breakfast"),
    "garden": words("garden rose flower tree leaf grass lily seed bird bush"),
    "mountain": words("mountain snow rock hill ice cliff peak cave frost winter"),
    "court": words("king queen crown throne palace prince duke castle knight princess"),
    "church": words("church priest prayer bishop monk saint sermon soul heaven faith"),
    "music": words("music song violin dance singer tune drum concert voice stage"),
    "sky": words("sky star moon sun cloud night dawn light evening morning"),
    "law": words("law prison witness lawyer judge trial crime murder thief jury"),
}
OPENINGS = words("The My Our His Her Old")
CATALOGUE_SIZE, CANDIDATES = 5000, 20
LIKED, DISLIKED = 3, 1

Title = tuple[str, str, str]
"""(opening, word, word)"""


def catalogue(rng: random.Random) -> dict[str, list[Title]]:
    """CATALOGUE_SIZE titles by family, as many in each."""
    titles: dict[str, list[Title]] = {}
    for family, members in FAMILIES.items():
        possible = [(o, first, second) for o in OPENINGS for first in members for second in members]
        possible = [title for title in possible if title[1] != title[2]]
        titles[family] = rng.sample(possible, CATALOGUE_SIZE // len(FAMILIES))
    return titles


def row(number: int, titles: dict[str, list[Title]], rng: random.Random) -> dict:
    """One reader: `{"user", "history", "candidates", "target"}`, the target among the candidates once."""
    taste, distaste = rng.sample(sorted(titles), 2)
    *liked, target = without_common_words(titles[taste], LIKED + 1, rng)
    disliked = without_common_words(titles[distaste], DISLIKED, rng)
    history = [{"title": written(title), "liked": True} for title in liked]
    history += [{"title": written(title), "liked": False} for title in disliked]
    rng.shuffle(history)
    others = [title for family in sorted(titles) if family != taste for title in titles[family]]
    others = [title for title in others if title not in disliked]
    candidates = [written(title) for title in [*rng.sample(others, CANDIDATES - 1), target]]
    rng.shuffle(candidates)
    return {
        "user": f"reader-{number:05d}",
        "history": history,
        "candidates": candidates,
        "target": written(target),
    }


def without_common_words(titles: list[Title], count: int, rng: random.Random) -> list[Title]:
    """`count` titles, no two of which have a word of the family in common."""
    chosen: list[Title] = []
    while len(chosen) < count:
        title = rng.choice(titles)
        if not {*title[1:]} & {word for other in chosen for word in other[1:]}:
            chosen.append(title)
    return chosen


def written(title: Title) -> str:
    return " ".join(title)
