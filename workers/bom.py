"""The bill of materials of a release: a CycloneDX 1.6 ML-BOM, which scanners read.

What can be checked stands in it: digests of every file and of the base, and the measured scores.
cyclonedx-python-lib makes the document; the model card, which the library does not know, is added by hand.
Equal releases have equal bytes: the serial number follows from the content and there is no time of writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6

from workers.manifest import json_digest

BOM = "bom.cdx.json"


def bill_of_materials(
    name: str, version: str, files: Mapping[str, str], properties: Mapping[str, str], card: str
) -> str:
    """The document's text. `files` maps a path in the release to its SHA-256; `card` is its README.md."""
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, json_digest([name, version, dict(files), dict(properties)])))
    bom.metadata.component = Component(
        name=name,
        version=version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        properties=[Property(name=f"chorus:{key}", value=value) for key, value in sorted(properties.items())],
    )
    for path, digest in sorted(files.items()):
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)]
        bom.components.add(Component(name=path, type=ComponentType.FILE, bom_ref=path, hashes=hashes))
        bom.register_dependency(bom.metadata.component, [_component(bom, path)])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"].pop("timestamp", None)
    document["metadata"]["component"]["modelCard"] = _model_card(card)
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _component(bom: Bom, reference: str) -> Component:
    return next(part for part in bom.components if part.bom_ref.value == reference)


def _model_card(text: str) -> dict[str, Any]:
    """CycloneDX's own model card: kind of model, and the scores of the README's model-index."""
    from huggingface_hub import ModelCard

    results = ModelCard(text).data.eval_results or []
    metrics = [_metric(result) for result in results]
    approach = {"modelParameters": {"approach": {"type": "supervised"}, "architectureFamily": "transformer"}}
    return {**approach, "quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else approach


def _metric(result: Any) -> dict[str, Any]:
    ends = (result.metric_args or {}).get("confidence_interval_95")
    found = {
        "type": result.metric_type,
        "value": f"{result.metric_value:.6g}",
        "slice": f"{result.dataset_name}: {result.dataset_type}",
    }
    if ends:
        found["confidenceInterval"] = {"lowerBound": f"{ends[0]:.6g}", "upperBound": f"{ends[1]:.6g}"}
    return found
