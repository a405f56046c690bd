"""The model card of an adapter version: what it is, how good it is beside its base, how to load it.

Owns the text of `README.md`. Pure; the front matter is written by `huggingface_hub`, whose hub reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.contracts import Scores

PIPELINES = {"chat": "text-generation", "classification": "text-classification", "recommendation": "other"}


def card(
    *,
    name: str,
    base_model: str,
    scores: Sequence[Scores],
    base_scores: Sequence[Scores] = (),
    trained_on: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    parents: Sequence[str] = (),
    rule: str = "",
    license: str = "",
    limits: Sequence[str] = (),
) -> str:
    """README.md of one version.

    `base_model` is its id or folder; `trained_on` maps a context to a data set (`training` -> path);
    `digests` are those the version is bound to (`base.digest`, ...); `parents` are `name/version` of what
    `rule` fused.
    """
    sections = [
        _front_matter(name, base_model, scores, license, bool(parents)),
        f"# {name}",
        _summary(base_model, scores, parents, rule),
        _score_section(scores, base_scores),
        _table_section("Trained on", ("use", "data"), trained_on or {}),
        _table_section("Parameters", ("parameter", "value"), params or {}),
        _table_section("Bound to", ("what", "SHA-256"), digests or {}),
        _loading(base_model),
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


def _summary(base_model: str, scores: Sequence[Scores], parents: Sequence[str], rule: str) -> str:
    tasks = ", ".join(dict.fromkeys(score.task for score in scores)) or "no task"
    if parents:
        listed = ", ".join(f"`{parent}`" for parent in parents)
        return (
            f"A LoRA adapter for `{base_model}`, fused by rule `{rule}` from {listed}. Measured on: {tasks}."
        )
    return f"A LoRA adapter for `{base_model}`, trained by Chorus. Measured on: {tasks}."


def _score_section(scores: Sequence[Scores], base_scores: Sequence[Scores]) -> str:
    base = {score.task: score.report.metrics for score in base_scores}
    rows = [
        (
            score.task,
            metric,
            _figure(base.get(score.task, {}).get(metric)),
            _figure(value),
            str(score.report.rows),
        )
        for score in scores
        for metric, value in score.report.metrics.items()
    ]
    return "## Scores\n\n" + _table(("task", "metric", "base", "adapter", "rows"), rows) if rows else ""


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table_section(title: str, header: tuple[str, str], rows: Mapping[str, str]) -> str:
    return f"## {title}\n\n" + _table(header, list(rows.items())) if rows else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _loading(base_model: str) -> str:
    return f"""## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base_model}"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")
tokenizer = AutoTokenizer.from_pretrained(base)
```

The base must be the one whose digest is given above: a name alone does not tell."""


def _limits(scores: Sequence[Scores], limits: Sequence[str]) -> str:
    """What a reader must not conclude; always says what the figures rest on."""
    measured = [f"{score.report.rows} rows of {score.dataset} ({score.task})" for score in scores]
    known = (
        [f"Scores are measured on {'; '.join(measured)}. They say nothing about other data."]
        if scores
        else []
    )
    known += ["It adds to one base only and inherits that base's faults.", *limits]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in known)
