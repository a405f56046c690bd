"""Run a fusion plan: adapters in, one adapter and its report out; from folders to a published folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.adapter import Adapter, adapter_digests, read_adapter, write_adapter
from workers.fuse.certificate import ModuleReport, module_report
from workers.fuse.cut import cut
from workers.fuse.factors import Factors, one_thread
from workers.fuse.grams import gram_of
from workers.fuse.in_turn import in_turn
from workers.fuse.normal import Module, adapter_of, common_targets, modules, output_dtype
from workers.fuse.reduced import reduced
from workers.fuse.report import REPORT, Overlap, Spectrum, as_json, clamped, inner_products, summary
from workers.fuse.rule import Options
from workers.fuse.rules import RULES
from workers.manifest import MANIFEST, json_digest, publish_folder, read_manifest, verify_folder
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
    check_plan(rule, rank, options)
    for given in (weights, *(found for _, found in groups)):
        check_weights(rule, given, len(adapters))
    asked, limit = Options(**asdict(options), rank=rank), rank or options.bucket
    names = names or [f"adapter {i + 1}" for i in range(len(adapters))]
    dtype = output_dtype(adapters)
    fused: dict[str, Factors] = {}
    reports: dict[str, ModuleReport] = {}
    overlap, spectra = Overlap(len(adapters)), Spectrum()
    with one_thread() as threads:
        plain = modules(adapters, weights, names)
        for done in in_turn(plain, lambda module: _one(module, rule, asked, groups, folders), threads):
            fused[done.name] = done.factors.to(dtype)
            reports[done.name] = done.report
            spectra.add(done.spectrum)
            overlap.add(done.inner)
    base_model = next((adapter.base_model for adapter in adapters if adapter.base_model), "")
    report = {
        "rule": rule,
        "rank": rank,
        "weights": list(weights),
        **({"groups": dict(groups)} if groups else {}),
        **({"options": as_given(options)} if as_given(options) else {}),
        "notes": clamped(limit, reports),
        "summary": summary(reports),
        "cosines": overlap.cosines(),
        "spectrum": spectra.values(),
        "modules": as_json(reports),
    }
    return adapter_of(fused, base_model, common_targets(adapters), dtype), report


@dataclass(frozen=True)
class _Done:
    """One module's result and figures."""

    name: str
    factors: Factors
    report: ModuleReport
    spectrum: Tensor
    inner: list[list[float]]


def _one(plain: Module, rule: str, asked: Options, groups: Groups, folders: Sequence[Path]) -> _Done:
    whole = _in_group(plain, groups)
    if rule == "regmean":
        whole = replace(whole, grams=tuple(gram_of(folder, whole.name) for folder in folders))
    small, turns = reduced(whole), RULES[rule].turns
    result = cut(_scaled(RULES[rule].apply(small.turned(turns), asked), asked.scale), asked)
    report, spectrum = module_report(whole, small.module, result)
    factors = small.back(result.factors, turns)
    return _Done(whole.name, factors, report, spectrum, inner_products(small.module.shares))


def fuse_folders(task: FuseTask) -> dict[str, Any]:
    """Fuse adapter folders into `task.out_dir`: PEFT's two files, `fusion.json` and a manifest. The report.

    Doing a plan again whose result is there changes nothing. Raises BadInput as `fuse` does, and where
    `out_dir` holds something else; CorruptFolder if a byte of an input differs from its manifest.
    """
    folders = [Path(folder) for folder in task.adapter_dirs]
    adapters = [read_adapter(folder) for folder in folders]
    base_digest = _common_base(folders, adapters)
    sources = [adapter_digests(folder) for folder in folders]
    weights = [float(weight) for weight in task.weights]
    options = as_given(task.options)
    plan = json_digest(
        [task.rule, task.rank, weights, sources, *task.groups, *([options] if options else [])]
    )
    out = Path(task.out_dir)
    if out.exists():
        return _done_before(out, plan)
    fused, report = fuse(
        adapters, weights, task.rule, task.rank, task.adapter_dirs, task.groups, task.options, folders
    )
    report["sources"] = sources
    with publish_folder(out, {"plan": plan, **base_digest}) as scratch:
        write_adapter(fused, scratch)
        (scratch / REPORT).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    return report


def _scaled(factors: Factors, scale: float | None) -> Factors:
    return factors if scale is None else Factors(scale * factors.a, factors.b)


def _in_group(module: Module, groups: Groups) -> Module:
    """With the weights of the first group whose word is in the module's name."""
    found = next((weights for part, weights in groups if part in module.name), None)
    return replace(module, weights=tuple(found)) if found is not None else module


def _done_before(out: Path, plan: str) -> dict[str, Any]:
    if not (out / MANIFEST).is_file() or read_manifest(out).get("plan") != plan:
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
