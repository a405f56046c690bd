"""Run a fusion plan: adapters in, one adapter and its report out; from folders to a published folder."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.adapter import WEIGHTS, Adapter, open_adapter, verify_adapter, write_config
from workers.factor_file import Pair, write_factors
from workers.fuse.basis import one_thread
from workers.fuse.certificate import ModuleReport, module_report
from workers.fuse.cut import cut
from workers.fuse.factors import Core, Factors, inner_products
from workers.fuse.grams import gram_of, verify_grams
from workers.fuse.in_turn import in_turn
from workers.fuse.normal import (
    Module,
    adapter_of,
    common_targets,
    module_names,
    modules,
    output_dtype,
    written,
)
from workers.fuse.reduced import reduced
from workers.fuse.report import REPORT, Overlap, Spectrum, as_json, clamped, summary
from workers.fuse.rule import Options
from workers.fuse.rules import RULES
from workers.manifest import (
    MANIFEST,
    CorruptFolder,
    json_digest,
    publish_folder,
    read_manifest,
    verify_folder,
)
from workers.progress import Tell, silent
from workers.rules import as_given, check_plan, check_weights
from workers.types import BadInput, FuseTask, RuleOptions

PLAIN = RuleOptions()
Groups = Sequence[tuple[str, Sequence[float]]]


def fuse(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rule: str = "cat",
    rank: int | None = None,
    names: Sequence[str] | None = None,
    groups: Groups = (),
    options: RuleOptions = PLAIN,
    folders: Sequence[Path] = (),
) -> tuple[Adapter, dict[str, Any]]:
    """One adapter for all, and the report. `names` say in errors which adapter is meant.

    `groups` give modules other weights than `weights`: see `FuseTask`. `folders` are where rule `regmean`
    finds the adapters' Gram matrices.

    Raises BadInput for a plan or adapters that do not fit together: another base, other shapes, NaN.
    """
    plan = _Plan(adapters, weights, rule, rank, names, groups, options, folders)
    found = _Report(plan)
    fused = dict(_results(plan, found))
    return adapter_of(fused, *_described(adapters)), found.as_json()


@dataclass(frozen=True)
class _Plan:
    """What `fuse` is asked for. Raises BadInput where its parts do not fit together."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    rule: str
    rank: int | None
    names: Sequence[str] | None
    groups: Groups
    options: RuleOptions
    folders: Sequence[Path]

    def __post_init__(self) -> None:
        check_plan(self.rule, self.rank, self.options)
        for given in (self.weights, *(found for _, found in self.groups)):
            check_weights(self.rule, given, len(self.adapters))

    def modules(self) -> Generator[Module]:
        names = self.names or [f"adapter {i + 1}" for i in range(len(self.adapters))]
        return modules(self.adapters, self.weights, names)


def _results(plan: _Plan, report: _Report) -> Generator[tuple[str, Factors]]:
    """Module by module, in the order of names; the figures of each are told to `report`."""
    asked, dtype = Options(**asdict(plan.options), rank=plan.rank), output_dtype(plan.adapters)
    with one_thread() as threads:
        for done in in_turn(plan.modules(), lambda module: _one(module, plan, asked), threads):
            report.add(done)
            yield done.name, written(done.factors, dtype)


class _Report:
    """Figures of a fusion as its modules come; the whole of them at the end."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._modules: dict[str, ModuleReport] = {}
        self._overlap, self._spectra = Overlap(len(plan.adapters)), Spectrum()

    def add(self, done: _Done) -> None:
        self._modules[done.name] = done.report
        self._spectra.add(done.spectrum)
        self._overlap.add(done.inner)

    def as_json(self) -> dict[str, Any]:
        plan, options = self._plan, as_given(self._plan.options)
        return {
            "rule": plan.rule,
            "rank": plan.rank,
            "weights": list(plan.weights),
            **({"groups": dict(plan.groups)} if plan.groups else {}),
            **({"options": options} if options else {}),
            "notes": clamped(plan.rank or plan.options.bucket, self._modules),
            "summary": summary(self._modules),
            "cosines": self._overlap.cosines(),
            "spectrum": self._spectra.values(),
            "modules": as_json(self._modules),
        }


@dataclass(frozen=True)
class _Done:
    """One module's result and figures."""

    name: str
    factors: Factors
    report: ModuleReport
    spectrum: Tensor
    inner: list[list[float]]


def _one(plain: Module, plan: _Plan, asked: Options) -> _Done:
    whole, rule = _in_group(plain, plan.groups), RULES[plan.rule]
    if plan.folders:
        whole = replace(whole, gram=lambda index: gram_of(plan.folders[index], whole.name))
    small, turns = reduced(whole), rule.turns
    result = cut(_scaled(rule.apply(small.turned(turns), asked), asked.scale), asked)
    report, spectrum = module_report(whole, small.module, result)
    # `cat` changes nothing in what it was given, so nothing has to be turned back.
    unchanged = plan.rule == "cat" and asked.scale is None
    factors = whole.stacked() if unchanged else small.back(result.factors, turns)
    return _Done(whole.name, factors, report, spectrum, inner_products(small.module.shares))


def fuse_folders(task: FuseTask, tell: Tell = silent) -> dict[str, Any]:
    """Fuse adapter folders into `task.out_dir`: PEFT's two files, `fusion.json` and a manifest. The report.

    Doing a plan again whose result is there changes nothing. Raises BadInput as `fuse` does, and where
    `out_dir` holds something else; CorruptFolder if a byte of an input differs from its manifest.
    """
    folders, out = [Path(folder) for folder in task.adapter_dirs], Path(task.out_dir)
    sources = [verify_adapter(folder) for folder in folders]
    if task.rule == "regmean":
        sources = [source | verify_grams(folder) for source, folder in zip(sources, folders, strict=True)]
    adapters = [open_adapter(folder) for folder in folders]
    base_digest = _common_base(folders, adapters)
    weights, options = [float(weight) for weight in task.weights], as_given(task.options)
    digest = json_digest(
        [task.rule, task.rank, weights, sources, *task.groups, *([options] if options else [])]
    )
    if out.exists():
        return _done_before(out, digest)
    plan = _Plan(
        adapters, weights, task.rule, task.rank, task.adapter_dirs, task.groups, task.options, folders
    )
    with publish_folder(out, {"plan": digest, **base_digest}) as scratch:
        report = {**_write(plan, scratch, tell), "sources": sources}
        (scratch / REPORT).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    return report


def _write(plan: _Plan, folder: Path, tell: Tell) -> dict[str, Any]:
    """PEFT's two files, module by module; the report."""
    found, shapes = _Report(plan), dict[str, Factors]()
    names = module_names(plan.adapters)

    def factors() -> Generator[tuple[str, Pair]]:
        for name, (a, b) in _results(plan, found):
            shapes[name] = Factors(a.to("meta"), b.to("meta"))
            yield name, (a, b)
            tell(len(shapes), len(names))

    with closing(factors()) as results:
        write_factors(folder / WEIGHTS, names, results)
    write_config(adapter_of(shapes, *_described(plan.adapters)), folder)
    return found.as_json()


def _described(adapters: Sequence[Adapter]) -> tuple[str, tuple[str, ...]]:
    """The base's name and the target modules of what is fused from `adapters`."""
    base_model = next((adapter.base_model for adapter in adapters if adapter.base_model), "")
    return base_model, common_targets(adapters)


def _scaled(result: Factors | Core, scale: float | None) -> Factors | Core:
    if scale is None:
        return result
    if isinstance(result, Core):
        return result._replace(middle=scale * result.middle)
    return Factors(scale * result.a, result.b)


def _in_group(module: Module, groups: Groups) -> Module:
    """With the weights of the first group whose word is in the module's name."""
    found = next((weights for part, weights in groups if part in module.name), None)
    return replace(module, weights=tuple(found)) if found is not None else module


def _done_before(out: Path, plan: str) -> dict[str, Any]:
    found = None
    with suppress(CorruptFolder):
        found = read_manifest(out).get("plan")
    if found != plan:
        raise BadInput(f"{out} exists and is not the result of this fusion; give another folder or remove it")
    verify_folder(out)
    return json.loads((out / REPORT).read_text())


def _common_base(folders: Sequence[Path], adapters: Sequence[Adapter]) -> dict[str, str]:
    """{"base_digest": ...} if the folders know it. By digest where two know theirs, else by name."""
    digests = [_base_digest(folder) for folder in folders]
    for i, digest in enumerate(digests):
        for j in range(i):
            known = digest and digests[j]
            one, other = (digest, digests[j]) if known else (adapters[i].base_model, adapters[j].base_model)
            if one and other and one != other:
                raise BadInput(
                    f"{folders[i]} was trained on base {one} but {folders[j]} on {other}; "
                    "fuse adapters of one base"
                )
    return next(({"base_digest": digest} for digest in digests if digest), {})


def _base_digest(folder: Path) -> str:
    return str(read_manifest(folder).get("base_digest", "")) if (folder / MANIFEST).is_file() else ""
