"""The two steps that speak to the registry: register a version whole, and judge and promote it.

Each may be interrupted anywhere and done again; neither changes a job's status. Both are done on an errand's
thread, as is `fetch`: they read what is finished and change nothing but the registry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.contracts import (
    AdapterVersion,
    NewVersion,
    NoSuchVersion,
    Registry,
    RegistryConflict,
    Scores,
)
from orchestrator.control.curve_export import CurveExport, params, run_inputs, tags
from orchestrator.control.ledger import Ledger, flat
from orchestrator.control.submission import Order
from orchestrator.gate import Verdict
from orchestrator.judgement import Conditions, Evidence, finding_view, gate_tags, judge, read_conditions
from orchestrator.plan.steps import EvaluateWhat, PromoteWhat, TrainWhat
from orchestrator.registry.card import card
from orchestrator.registry.evaluations import read_scores
from orchestrator.registry.outlines import structure_in, structure_of
from orchestrator.structure import Structure
from workers.types import BadInput, EvaluationSpec

CANDIDATE, CHAMPION = "candidate", "champion"
ROUNDS = 5
"""Times that a version is judged while others move its champion."""


class GateFailed(Exception):
    """A version did not meet its gates; the message says by how much. It stays registered as candidate."""


@dataclass(frozen=True)
class Registration:
    """What the two steps work with."""

    registry: Registry
    ledger: Ledger
    curves: CurveExport
    home: Path

    def register(self, order: Order, step_id: str) -> dict[str, Any]:
        """One whole version in the registry, beside its run's evaluation; the step's result."""
        self.ledger.fetch(order.registered.adapter)
        new = self._new_version(order, step_id)
        self.registry.log_evaluation(new.run_id, new.scores)
        self.registry.log_evaluation(new.run_id, new.base_scores, prefix="base")
        version = self.registry.register(new)
        self.registry.end_run(new.run_id, "FINISHED")
        return {
            "name": version.name,
            "version": version.version,
            "model_id": version.model_id,
            "run_id": new.run_id,
            "digest": version.digest,
            "card": new.card,
        }

    def promote(self, order: Order, what: PromoteWhat) -> dict[str, Any]:
        """Point `candidate` at the version, check its gates, move `champion`. Raises GateFailed.

        If another moves the champion meanwhile, the version is judged again beside the new one.
        """
        number = int(self.ledger.result(order.job.step("register").id)["version"])
        self.registry.set_alias(what.name, CANDIDATE, number)
        for _ in range(ROUNDS - 1):
            with suppress(RegistryConflict):
                return self._promote(order, what, number)
        return self._promote(order, what, number)

    def _promote(self, order: Order, what: PromoteWhat, number: int) -> dict[str, Any]:
        """Raises GateFailed, RegistryConflict."""
        self.registry.finish_move(what.name)
        version, champion = self.registry.version(what.name, str(number)), self._champion(what.name)
        theirs = None if champion is None else read_scores(self.registry, champion)
        found = structure_of(self.registry, version, _base_folder(order))
        verdict = self._judge(order, what, found, theirs)
        self.registry.set_tags(what.name, number, gate_tags(verdict))
        if not verdict.passed:
            raise GateFailed(f"{what.name} version {number} stays candidate: {verdict.words}")
        if what.promote and (champion is None or champion.version != number):
            expected = champion.version if champion else None
            figures = flat(self.ledger.scores(what.scores))
            self.registry.promote(what.name, number, expected, f"{order.job.name}: {verdict.words}", figures)
        findings = [finding_view(finding) for finding in verdict.findings]
        return {"name": what.name, "version": number, "champion": what.promote, "findings": findings}

    def fetch(self, order: Order, references: Iterable[str]) -> dict[str, str]:
        """NAME@REF -> folder, fetched and verified. Raises BadInput if that is another version now."""
        return {reference: str(self._fetch(order, reference)) for reference in references}

    def _fetch(self, order: Order, reference: str) -> Path:
        version = self._planned_version(order, reference)
        return self.registry.download(version, self.home / "downloads" / version.digest)

    def registered_label(self, order: Order) -> str:
        """`name/version` of a job's version."""
        registered = self.ledger.result(order.job.step("register").id)
        return f"{registered['name']}/{registered['version']}"

    def released_card(self, order: Order) -> str:
        """The card that the version was registered with; it tells of the champion of that moment."""
        return str(self.ledger.result(order.job.step("register").id)["card"])

    def _card(self, order: Order) -> str:
        """The README.md of a job's version."""
        what, figures = order.registered, params(order)
        champion = self._champion(what.name)
        theirs = None if champion is None else self._scores_of(champion)
        found = structure_in(self.ledger.adapter_dir(what.adapter), _base_folder(order))
        promoted = order.job.step("promote").what
        assert isinstance(promoted, PromoteWhat)
        return card(
            name=what.name,
            base_model=order.job.base.name or order.job.base.path,
            scores=_portable(self.ledger.scores(what.scores)),
            base_scores=_portable(self.ledger.scores(what.base_scores)),
            champion=None if champion is None or theirs is None else (_label(champion), theirs),
            gates=self._judge(order, promoted, found, theirs).findings,
            controls=self._controls(order),
            trained_on={
                context: _short(path)
                for context, (path, _) in run_inputs(order).items()
                if context in ("training", "validation")
            },
            params=figures,
            digests={key: value for key, value in tags(order).items() if key.endswith(".digest")},
            parents=self._parents(order),
            rule=figures.get("rule", ""),
        )

    def _new_version(self, order: Order, step_id: str) -> NewVersion:
        what = order.registered
        return NewVersion(
            step_id=step_id,
            name=what.name,
            run_id=self.curves.run_of(order),
            adapter_dir=self.ledger.adapter_dir(what.adapter),
            model_type="lora-adapter-fused" if order.job.kind == "fuse" else "lora-adapter",
            tags=tags(order),
            params=params(order),
            scores=self.ledger.scores(what.scores),
            base_scores=self.ledger.scores(what.base_scores),
            recipe_yaml=what.recipe_yaml,
            card=self._card(order),
            controls=self._controls(order),
            tasks=_tasks(order),
            parents=self._parents(order),
            fusion_report=self._fusion_report(order),
        )

    def _fusion_report(self, order: Order) -> dict[str, Any] | None:
        """What fused the version, and what it was measured beside; None for a trained one."""
        if order.job.kind != "fuse":
            return None
        what = order.registered
        report = dict(self.ledger.result(what.adapter).get("report") or {})
        if order.train is not None:
            report = {**params(order), **self._start(order.train)}
        if what.controls:
            scores = {name: self.ledger.scores(steps) for name, steps in what.controls.items()}
            report["controls"] = controls(scores)
        return report

    def _start(self, train: TrainWhat) -> dict[str, Any]:
        """The report of the sum that a student started from."""
        if train.start is None:
            return {}
        start = self.ledger.result(train.start)["report"]
        return {"cosines": start["cosines"], "start": start}

    def _parents(self, order: Order) -> tuple[str, ...]:
        return tuple(self._parent(order, parent) for parent in order.registered.parents)

    def _parent(self, order: Order, parent: str) -> str:
        """`name/version` of a parent: NAME@REF, or the step of this run that registered it."""
        if "@" in parent:
            version = self._planned_version(order, parent)
            return f"{version.name}/{version.version}"
        registered = self.ledger.result(parent)
        return f"{registered['name']}/{registered['version']}"

    def _planned_version(self, order: Order, reference: str) -> AdapterVersion:
        name, _, ref = reference.partition("@")
        version = self.registry.version(name, ref)
        if version.digest != order.adapters[reference]:
            raise BadInput(f"{reference} is another version than when this job was submitted; submit again")
        return version

    def _controls(self, order: Order) -> dict[str, Sequence[Scores]]:
        """What a fusion must beat: each parent on its own task, and what was planned beside them."""
        if order.job.kind != "fuse":
            return {}
        promoted = order.job.step("promote").what
        assert isinstance(promoted, PromoteWhat)
        own = self.ledger.scores(promoted.parent_scores)
        parents = dict(zip(self._parents(order), ((score,) for score in own), strict=True))
        planned = {name: self.ledger.scores(steps) for name, steps in order.registered.controls.items()}
        return {name: _portable(scores) for name, scores in (planned | parents).items()}

    def _scores_of(self, version: AdapterVersion) -> Sequence[Scores]:
        """Verified; none of a version that was altered since, which is found out where it matters."""
        try:
            return _portable(read_scores(self.registry, version))
        except (NoSuchVersion, RegistryConflict):
            return ()

    def _champion(self, name: str) -> AdapterVersion | None:
        try:
            return self.registry.version(name, CHAMPION)
        except NoSuchVersion:
            return None

    def _judge(
        self, order: Order, what: PromoteWhat, found: Structure, champion: Sequence[Scores] | None
    ) -> Verdict:
        of_name = read_conditions(dict(self.registry.conditions(what.name)), f"the gates of {what.name}")
        asked = Conditions(
            *(what.gates, what.champion_margin, what.non_inferiority, what.retention, what.worst_task),
            structure=what.structure,
        )
        evidence = Evidence(
            scores=self.ledger.scores(what.scores),
            parents=flat(self.ledger.scores(what.parent_scores)),
            champion=champion,
            structure=found,
            fused=order.job.kind == "fuse",
        )
        return judge([asked, of_name], evidence)


def _base_folder(order: Order) -> Path:
    return Path(order.job.base.path)


def _label(version: AdapterVersion) -> str:
    return f"{version.name}/{version.version}"


def _tasks(order: Order) -> dict[str, EvaluationSpec]:
    """Task -> how its rows are read."""
    steps = [step.what for step in order.job.steps if isinstance(step.what, EvaluateWhat)]
    return {what.task: what.evaluation for what in steps}


def controls(scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Every control's figures by `<task>.<metric>`, and the parent that does best on all tasks together.

    That is by mean loss per target token over the tasks, the one figure all kinds of rows have.
    """
    figures = {name: flat(found) for name, found in scores.items()}
    losses = {
        name: math.fsum(score.report.metrics["loss"] for score in found) / len(found)
        for name, found in scores.items()
        if name.startswith("parent ")
    }
    rows = {score.task: score.report.rows for found in scores.values() for score in found}
    return {"rows": rows, "best_single": min(losses, key=losses.__getitem__), "scores": figures}


def _portable(scores: Sequence[Scores]) -> tuple[Scores, ...]:
    """A card is read elsewhere: it names data sets without the folders of this machine."""
    return tuple(replace(score, dataset=_short(score.dataset)) for score in scores)


def _short(paths: str) -> str:
    """The last two parts of each path."""
    return ", ".join("/".join(Path(path).parts[-2:]) for path in paths.split(", "))
