"""`Registry` in memory, for tests of what uses one; kept honest by the contract test it shares."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator.contracts import (
    AdapterVersion,
    NewVersion,
    NoSuchVersion,
    Problem,
    RegistryConflict,
    ReleaseRecord,
    Scores,
)
from orchestrator.registry import evaluations
from workers.manifest import MANIFEST, folder_digest, publish_folder, verify_folder
from workers.types import BadInput

FIXED = {"chorus.step_id", "adapter.digest", "manifest.digest", "fusion.parents"}


@dataclass
class MemoryRun:
    experiment: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    status: str = "RUNNING"
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    inputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    evaluations: dict[str, Scores] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class MemoryRegistry:
    """Bytes lie under `store`, one folder a version, so that a test can alter them."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.runs: dict[str, MemoryRun] = {}
        self.releases: list[ReleaseRecord] = []
        self._run_ids: dict[tuple[str, str], str] = {}
        self._versions: dict[tuple[str, int], AdapterVersion] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._aliases: dict[str, dict[str, int]] = {}
        self._conditions: dict[str, dict[str, Any]] = {}

    def start_run(self, key, experiment, name, params, tags):
        run_id = self._run_ids.setdefault((experiment, key), uuid4().hex)
        run = self.runs.setdefault(run_id, MemoryRun(experiment, name, {}, {}))
        run.params = {**params, **run.params}
        run.tags.update(tags)
        run.status = "RUNNING" if run.status in ("FAILED", "KILLED") else run.status
        return run_id

    def log_metrics(self, run_id, points):
        self.runs[run_id].points.update({(p.key, p.step): p.value for p in points})

    def log_inputs(self, run_id, datasets):
        self.runs[run_id].inputs.update(datasets)

    def log_evaluation(self, run_id, scores, prefix=""):
        self.runs[run_id].evaluations.update({f"{prefix}/{s.task}".strip("/"): s for s in scores})

    def log_text(self, run_id, path, text):
        self.runs[run_id].texts[path] = text

    def end_run(self, run_id, status):
        self.runs[run_id].status = status

    def register(self, new: NewVersion) -> AdapterVersion:
        for version in self.versions(new.name):
            if version.tags["chorus.step_id"] == new.step_id:
                return version
        if (new.adapter_dir / MANIFEST).exists():
            verify_folder(new.adapter_dir)
        model_id, digest = f"m-{uuid4().hex}", folder_digest(new.adapter_dir)
        shutil.copytree(new.adapter_dir, self.store / model_id)
        self._texts[model_id] = {
            "README.md": new.card,
            "recipe.yaml": new.recipe_yaml,
            **evaluations.documents(new.scores, new.base_scores, new.controls),
        }
        number = 1 + max((v.version for v in self.versions(new.name)), default=0)
        tags = {"gate.status": "pending", **new.tags, "chorus.step_id": new.step_id, "adapter.digest": digest}
        if new.parents:
            tags["fusion.parents"] = ",".join(new.parents)
        metrics = _metrics("", new.scores) | _metrics("base/", new.base_scores)
        made = AdapterVersion(new.name, number, model_id, new.run_id, digest, tags, (), metrics, 1)
        self._versions[new.name, number] = made
        return made

    def versions(self, name=None):
        found = [version for key, version in sorted(self._versions.items()) if name in (None, key[0])]
        return [self._with_aliases(version) for version in found]

    def version(self, name, ref):
        number = int(ref) if ref.isdigit() else self._aliases.get(name, {}).get(ref)
        if (name, number) not in self._versions:
            raise NoSuchVersion(f"{name} has no version or alias {ref!r}")
        return self._with_aliases(self._versions[name, number])

    def _with_aliases(self, version):
        aliases = self._aliases.get(version.name, {}).items()
        return replace(
            version, aliases=tuple(sorted(a for a, number in aliases if number == version.version))
        )

    def rebind(self, name, number):
        """As if the bytes that lie there now were those that were registered: an adapter from elsewhere."""
        found = self._versions[name, number]
        self._versions[name, number] = replace(found, digest=folder_digest(self.store / found.model_id))

    def _check(self, version):
        if folder_digest(self.store / version.model_id) != version.digest:
            raise RegistryConflict(f"{version.name}/{version.version} was altered in the registry")

    def download(self, version, to):
        if not to.exists():
            self._check(version)
            with suppress(FileExistsError), publish_folder(to) as scratch:
                shutil.copytree(self.store / version.model_id, scratch, dirs_exist_ok=True)
        if folder_digest(to) != version.digest:
            raise RegistryConflict(f"{to} exists and is not {version.name}/{version.version}")
        return to

    def read_text(self, version, path):
        self._check(version)
        if path not in self._texts[version.model_id]:
            raise NoSuchVersion(f"{version.name}/{version.version} holds no file {path}")
        return self._texts[version.model_id][path]

    def set_tags(self, name, version, tags):
        found = self.version(name, str(version))
        if FIXED & tags.keys():
            raise BadInput(f"{min(FIXED & tags.keys())} cannot be changed")
        self._versions[name, version] = replace(found, tags={**found.tags, **tags})

    def set_alias(self, name, alias, version):
        if alias in ("champion", "previous"):
            raise BadInput(f"{alias} moves by promote and rollback only")
        self.version(name, str(version))
        self._aliases.setdefault(name, {})[alias] = version

    def promote(self, name, version, expected_champion, reason, figures):
        wanted = self.version(name, str(version))
        done = [(record.kind, record.source, record.target) for record in self.finish_move(name)]
        champion = self._aliases.get(name, {}).get("champion")
        asked_again = done and done[-1] == ("promote", expected_champion or 0, version)
        if champion == version and (asked_again or expected_champion == version):
            return wanted
        if champion != expected_champion:
            raise RegistryConflict(f"the champion of {name} is {champion}, not {expected_champion}")
        self._check(wanted)
        return self._move("promote", name, champion, wanted, reason, figures)

    def rollback(self, name, expected_champion, reason):
        done = [(record.kind, record.source, record.target) for record in self.finish_move(name)]
        champion = self._aliases.get(name, {}).get("champion")
        if done and done[-1] == ("rollback", expected_champion, champion):
            return self.version(name, "champion")
        if champion != expected_champion:
            raise RegistryConflict(f"the champion of {name} is {champion}, not {expected_champion}")
        target = self.version(name, "previous")
        self._check(target)
        return self._move("rollback", name, self._aliases[name]["champion"], target, reason, {})

    def _move(self, kind, name, source, target, reason, figures):
        digests = {key: value for key, value in target.tags.items() if key.endswith(".digest")}
        number = 1 + len(self.history(name))
        self.releases.append(
            ReleaseRecord(
                *(number, name, kind, source or 0, target.version, "me@here", 1, reason),
                *(dict(figures), digests, False),
            )
        )
        self._carry_out(self.releases[-1])
        return self.version(name, "champion")

    def _carry_out(self, record):
        moved = {"champion": record.target} | ({"previous": record.source} if record.source else {})
        self._aliases.setdefault(record.name, {}).update(moved)
        if record.kind == "promote":
            self.set_tags(record.name, record.target, {"gate.status": "passed"})
        self._end(record)

    def _end(self, record):
        self.releases[self.releases.index(record)] = replace(record, done=True)

    def finish_move(self, name):
        for record in self.history(name):
            if not record.done:
                self._carry_out(record)
        return self.history(name)

    def history(self, name):
        return [record for record in self.releases if record.name == name]

    def conditions(self, name):
        return self._conditions.get(name, {})

    def set_conditions(self, name, conditions):
        if not self.versions(name):
            raise NoSuchVersion(f"no adapter is registered as {name}")
        self._conditions[name] = dict(conditions)

    def audit(self, name=None):
        return [problem for version in self.versions(name) for problem in self._problems(version)]

    def _problems(self, version):
        try:
            self._check(version)
        except RegistryConflict as error:
            yield Problem(version.name, version.version, str(error))


def _metrics(prefix, scores):
    return {
        f"{prefix}{s.task}/{k}".replace("@", "_at_"): v for s in scores for k, v in s.report.metrics.items()
    }
