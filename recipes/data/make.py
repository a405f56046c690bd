"""Write the sample data: `python recipes/data/make.py [--out DIR]`.

Standard library only, and deterministic: a run writes the committed files again, byte for byte. Owns the
sizes, the seeds and the promise that no row of one split is in another; what a row says is in the module
of its task.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import finance
import recommendation
import support

SIZES = {"train": 3000, "validation": 300, "test": 500}
SEED = 20261122


def same(row: dict) -> str:
    """What makes two rows the same: all that a model reads, digits aside."""
    read = {key: value for key, value in row.items() if key not in ("user", "candidates")}
    return re.sub(r"\d", "0", json.dumps(read))


def draw(new_row: Callable[[], dict], size: int, seen: set[str]) -> list[dict]:
    """`size` rows, none of which is in `seen`; adds them to it."""
    rows: list[dict] = []
    while len(rows) < size:
        row = new_row()
        if same(row) not in seen:
            seen.add(same(row))
            rows.append(row)
    return rows


def support_rows() -> dict[str, list[dict]]:
    rng, seen = random.Random(SEED), set[str]()
    return {split: draw(lambda: support.row(rng), size, seen) for split, size in SIZES.items()}


def finance_rows() -> dict[str, list[dict]]:
    rng, seen = random.Random(SEED + 1), set[str]()
    splits = {}
    for split, size in SIZES.items():
        splits[split] = draw(lambda split=split: finance.row(split, rng), size, seen)
    return splits


def recommendation_rows() -> dict[str, list[dict]]:
    rng, seen = random.Random(SEED + 2), set[str]()
    titles = recommendation.catalogue(rng)
    numbers = iter(range(10**6))
    return {
        split: draw(lambda: recommendation.row(next(numbers), titles, rng), size, seen)
        for split, size in SIZES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    tasks = {"support": support_rows(), "finance": finance_rows(), "recommendation": recommendation_rows()}
    for task, splits in tasks.items():
        (out / task).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / task / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
