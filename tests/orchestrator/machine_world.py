"""What every sequence of the state machine starts from, made once: a home with an empty store, and plans."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from orchestrator.control.submission import new_run
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.rows import NewRun
from orchestrator.store.store import Store
from tests.orchestrator.recipe_files import finance, write_world, write_yaml


@cache
def scratch() -> Path:
    """In memory where there is such a place."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="chorus-machine-", dir=shared if shared.is_dir() else None))


@cache
def template() -> Path:
    """A world with an empty store."""
    folder = write_world(scratch() / "template")
    (folder / "home").mkdir()
    Store(f"sqlite:///{folder}/home/chorus.db").close()
    return folder


@cache
def plans() -> tuple[NewRun, ...]:
    folder = template()
    bases = {"narrow": 1, "wide": 2, "widest": 4}
    for name, size in bases.items():
        write_yaml(folder / "bases" / f"{name}.yaml", {"model": "tiny", "world_size": size, "slots": 2})
    made: list[NewRun] = []
    for number in range(6):
        base = list(bases)[number % 3]
        schedule = {"team": "ab"[number % 2], "priority": 50 + 10 * (number == 5)}
        recipe = finance(
            name=f"job-{number}",
            base_model=f"bases/{base}.yaml",
            max_steps=3 + number,
            seed=number,
            schedule=schedule,
        )
        path = write_yaml(folder / f"job-{number}.yaml", recipe)
        made.append(new_run(make_plan(load_pipeline(path))))
    return tuple(made)
