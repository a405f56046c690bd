"""The model card of an adapter version: what it is, how good it is beside its base, how to load it.

Owns the text of `README.md`. Pure; the front matter is written by `huggingface_hub`, whose hub reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.bootstrap import Interval, interval
from orchestrator.contracts import Scores
from orchestrator.gate import METRICS, Finding, retained
from orchestrator.judgement import HEADLINES, difference
from orchestrator.registry.examples import example_section

PIPELINES = {"chat": "text-generation", "classification": "text-classification", "recommendation": "other"}
FEW_ROWS = 200
"""With fewer, an interval of a share is wider than about 7 points."""


def card(
    *,
    name: str,
    base_model: str,
    scores: Sequence[Scores],
    base_scores: Sequence[Scores] = (),
    champion: tuple[str, Sequence[Scores]] | None = None,
    controls: Mapping[str, Sequence[Scores]] | None = None,
    gates: Sequence[Finding] = (),
    trained_on: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    parents: Sequence[str] = (),
    rule: str = "",
    license: str = "",
    limits: Sequence[str] = (),
) -> str:
    """README.md of one version.

    `base_model` is its id or folder; `champion` is the champion it was registered beside, `name/version` and
    its scores; `gates` are what was found then of each condition; `controls` are what a fusion is compared
    with, by name, each scored on some of the tasks;
    `trained_on` maps a context to a data set (`training` -> path); `digests` are what the version is bound to
    (`base.digest`, ...); `parents` are `name/version` of what `rule` fused.
    """
    sections = [
        _front_matter(name, base_model, scores, license, bool(parents)),
        f"# {name}",
        _summary(base_model, scores, parents, rule),
        _score_section(scores, base_scores, champion),
        _gate_section(gates),
        _control_section(scores, base_scores, controls or {}),
        example_section(scores),
        _table_section("Trained on", ("use", "data"), trained_on or {}),
        _table_section("Parameters", ("parameter", "value"), params or {}),
        _table_section("Bound to", ("what", "SHA-256"), digests or {}),
        _loading(name, base_model, scores),
        _limits(scores, limits),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(name: str, base_model: str, scores: Sequence[Scores], license: str, fused: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=PIPELINES[score.report.task_type],
            dataset_type=score.dataset,
            dataset_name=score.task,
            metric_type=metric,
            metric_value=round(value, 6),
            metric_args=_as_args(interval(score.report, metric)),
        )
        for score in scores
        for metric, value in score.report.metrics.items()
    ]
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        license=license or None,
        model_name=name,
        tags=["lora", "chorus", *(["merge"] if fused else []), *sorted({score.task for score in scores})],
        eval_results=results or None,
        base_model_relation="merge" if fused else "adapter",
    )
    return f"---\n{data}\n---"


def _as_args(ends: Interval | None) -> dict[str, list[float]] | None:
    return None if ends is None else {"confidence_interval_95": [round(end, 6) for end in ends]}


def _summary(base_model: str, scores: Sequence[Scores], parents: Sequence[str], rule: str) -> str:
    tasks = ", ".join(dict.fromkeys(score.task for score in scores)) or "no task"
    if parents:
        listed = ", ".join(f"`{parent}`" for parent in parents)
        return (
            f"A LoRA adapter for `{base_model}`, fused by rule `{rule}` from {listed}. Measured on: {tasks}."
        )
    return f"A LoRA adapter for `{base_model}`, trained by Chorus. Measured on: {tasks}."


# ---- scores ---------------------------------------------------------------------------------------------


def _score_section(
    scores: Sequence[Scores], base_scores: Sequence[Scores], champion: tuple[str, Sequence[Scores]] | None
) -> str:
    """Every metric with its interval, beside base and champion; differences are of the same rows, paired."""
    keys = [(score, metric) for score in scores for metric in score.report.metrics]
    if not keys:
        return ""
    header = ["task", "metric", "base", "adapter", "minus base"]
    if champion is not None:
        header += [champion[0], f"minus {champion[0]}"]
    rows = [_score_row(score, metric, scores, base_scores, champion) for score, metric in keys]
    words = (
        "In brackets the 95% interval over the rows, by bootstrap; a difference is of the same rows, paired. "
        "Lower is better for " + ", ".join(name for name, m in METRICS.items() if m.lower_is_better) + "."
    )
    counts = ", ".join(f"{score.report.rows} of {score.task}" for score in scores)
    return f"## Scores\n\n{_table(header, rows)}\n\nRows: {counts}. {words}"


def _score_row(
    score: Scores,
    metric: str,
    scores: Sequence[Scores],
    base_scores: Sequence[Scores],
    champion: tuple[str, Sequence[Scores]] | None,
) -> list[str]:
    key = f"{score.task}.{metric}"
    adapter = _with_ends(score.report.metrics[metric], interval(score.report, metric))
    row = [score.task, metric, _figure(_of(base_scores, key)), adapter]
    row.append(_ends(difference(key, scores, base_scores)))
    if champion is not None:
        row += [_figure(_of(champion[1], key)), _ends(difference(key, scores, champion[1]))]
    return row


def _gate_section(gates: Sequence[Finding]) -> str:
    """Every condition as it was found when the version was registered."""
    rows = [
        [gate.metric, gate.required, _figure(gate.found), "yes" if gate.passed else "**no**"]
        for gate in gates
    ]
    words = "As found at its registration; a promotion checks them again."
    return f"## Gates\n\n{_table(('condition', 'required', 'found', 'met'), rows)}\n\n{words}" if rows else ""


def _control_section(
    scores: Sequence[Scores], base_scores: Sequence[Scores], controls: Mapping[str, Sequence[Scores]]
) -> str:
    """A fusion beside what it must beat, by the headline metric of each task."""
    if not controls:
        return ""
    named = {"base": base_scores, **controls}
    keys = [f"{score.task}.{HEADLINES[score.report.task_type]}" for score in scores]
    rows = [
        [name, *(_figure(_of(found, key)) for key in keys), _kept(found, scores, keys)]
        for name, found in (*named.items(), ("**this**", scores))
    ]
    words = (
        "*kept* is the least share of its score, over the tasks it was scored on, that this adapter keeps."
    )
    return f"## Controls\n\n{_table(('adapter', *keys, 'kept'), rows)}\n\n{words}"


def _kept(control: Sequence[Scores], scores: Sequence[Scores], keys: Sequence[str]) -> str:
    pairs = [(key, _of(scores, key), _of(control, key)) for key in keys]
    shares = [
        retained(key, own, theirs) for key, own, theirs in pairs if own is not None and theirs is not None
    ]
    return f"{min(shares):.0%}" if shares else "-"


def _of(scores: Sequence[Scores], key: str) -> float | None:
    task, _, metric = key.rpartition(".")
    return next((score.report.metrics.get(metric) for score in scores if score.task == task), None)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _with_ends(value: float, ends: Interval | None) -> str:
    return _figure(value) if ends is None else f"{value:.4g} [{ends.low:.4g}, {ends.high:.4g}]"


def _ends(ends: Interval | None) -> str:
    return "-" if ends is None else f"[{ends.low:+.4g}, {ends.high:+.4g}]"


# ---- the rest -------------------------------------------------------------------------------------------


def _table_section(title: str, header: tuple[str, str], rows: Mapping[str, str]) -> str:
    return f"## {title}\n\n" + _table(header, list(rows.items())) if rows else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


ROWS = {
    "chat": '{"messages": [{"role": "user", "content": "Hello"}]}',
    "classification": '{"text": "Hello"}',
    "recommendation": '{"history": ["One", "Two"], "candidates": ["Three", "Four"]}',
}
"""Task type -> a row of it as it is asked, without the answer."""


def _loading(name: str, base_model: str, scores: Sequence[Scores]) -> str:
    return f"""## Loading

In the folder of the adapter, with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base_model}"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")
tokenizer = AutoTokenizer.from_pretrained(base)
```

From the registry, where Chorus is installed; MLFLOW_TRACKING_URI is the address that `chorus ui` prints:

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{name}@champion", model_config={{"base": "{base_model}"}})
print(model.predict([{_rows(scores)}]))
```

The base must be the one whose digest is given above: a name alone does not tell. The command
`chorus release {name}@champion --out DIR --merged` writes a full model instead."""


def _rows(scores: Sequence[Scores]) -> str:
    """One a task; a row names its task where there are several."""
    rows = [ROWS[score.report.task_type] for score in scores]
    if len(scores) > 1:
        tasks = [score.task for score in scores]
        rows = [f'{{"task": "{task}", {row[1:]}' for task, row in zip(tasks, rows, strict=True)]
    return ", ".join(rows)


def _limits(scores: Sequence[Scores], limits: Sequence[str]) -> str:
    """What a reader must not conclude; always says what the figures rest on."""
    measured = [f"{score.report.rows} rows of {score.dataset} ({score.task})" for score in scores]
    known = (
        [f"Scores are measured on {'; '.join(measured)}. They say nothing about other data."]
        if scores
        else []
    )
    known += [weakness for score in scores for weakness in _weaknesses(score)]
    known += ["It adds to one base only and inherits that base's faults.", *limits]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in known)


def _weaknesses(score: Scores) -> list[str]:
    """What the measurement itself shows: few rows, the label most often missed, no replies."""
    report, found = score.report, list[str]()
    if report.rows < FEW_ROWS:
        found.append(f"{report.rows} rows of {score.task} are few: look at the intervals, not at the scores.")
    recalls = {
        label: row[place] / sum(row)
        for place, (label, row) in enumerate(zip(report.labels, report.confusion, strict=False))
        if sum(row)
    }
    if recalls:
        worst = min(recalls, key=recalls.__getitem__)
        found.append(f"{score.task}: it finds {worst!r} least often, in {recalls[worst]:.0%} of its rows.")
    if report.task_type == "chat" and "rouge_l" not in report.metrics:
        found.append(f"{score.task}: no reply was generated; only references were scored.")
    return found
