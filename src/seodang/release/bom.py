"""The bill of materials: a CycloneDX 1.6 ML-BOM of the model, its data, its teacher and software.

The library writes the components; it has no model card yet, which is added to its JSON.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from seodang.artifact import FileEntry, Source, canonical_json
from seodang.release.facts import Facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cyclonedx.model import HashType, Property
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

# Licences, for those whose metadata does not state them as an SPDX expression.
SOFTWARE = {
    "seodang": "Apache-2.0",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "tokenizers": "Apache-2.0",
    "safetensors": "Apache-2.0",
    "xllamacpp": "MIT",
}
_MODEL = "model"


def bill_of_materials(facts: Facts) -> str:
    """bom.cdx.json of a release. It has no timestamp, and its serial number is derived from it."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    data = [_source(s, ComponentType.DATA, f"data:{i}") for i, s in enumerate(facts.data)]
    software = [
        Component(
            name=name,
            type=ComponentType.LIBRARY,
            version=found,
            bom_ref=f"software:{name}",
            licenses=_licenses(stated or license_id),
            purl=PackageURL("pypi", None, name, found),
        )
        for name, license_id in SOFTWARE.items()
        for found, stated in _installed(name)
    ]
    bom = Bom(components=[*data, *software])
    bom.metadata.component = _model(facts)
    bom.register_dependency(bom.metadata.component, [*data, *software])
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"].pop("timestamp")
    document["metadata"]["component"]["modelCard"] = _model_card(
        facts, datasets=[str(component.bom_ref) for component in data]
    )
    del document["serialNumber"]
    document["serialNumber"] = uuid5(NAMESPACE_URL, canonical_json(document).decode()).urn
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _model(facts: Facts) -> Component:
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    teachers = [
        _source(source, ComponentType.MACHINE_LEARNING_MODEL, f"teacher:{i}")
        for i, source in enumerate(facts.teachers)
    ]
    return Component(
        name=facts.config.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=facts.student.digest[:12],
        bom_ref=_MODEL,
        description=facts.config.description or None,
        licenses=_licenses(facts.config.license),
        pedigree=Pedigree(ancestors=teachers) if teachers else None,
        components=[_weights(entry) for entry in facts.weights],
        properties=_properties(
            {
                "seodang:student": facts.student.digest,
                "seodang:soft-labels": facts.soft_labels.digest,
                "seodang:corpus": facts.corpus.digest,
                "seodang:evaluation": facts.evaluation.digest,
            }
        ),
    )


def _weights(entry: FileEntry) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=entry.path,
        type=ComponentType.FILE,
        bom_ref=f"file:{entry.path}",
        hashes=_hashes(entry.sha256),
        properties=_properties({"seodang:bytes": entry.size}),
    )


def _source(source: Source, kind: Any, bom_ref: str) -> Component:
    from cyclonedx.model.component import Component

    return Component(
        name=source.name,
        type=kind,
        version=source.version,
        bom_ref=bom_ref,
        hashes=_hashes(source.sha256) if source.sha256 else None,
        licenses=_licenses(source.license),
        copyright=source.attribution,
        properties=_properties(
            {"seodang:documents": source.documents, "seodang:tokens": source.tokens}
        ),
    )


def _model_card(facts: Facts, datasets: list[str]) -> dict[str, Any]:
    """CycloneDX 1.6 ``modelCard``."""
    models = facts.metrics["models"]
    held_out = f"{facts.metrics['held_out']['positions']} held-out positions"
    figures = [
        {"type": f"{model}.{metric}", "value": f"{models[model][metric]:.6g}", "slice": held_out}
        for model in sorted(models)
        for metric in ("kl", "top1_agreement", "perplexity", "calibration_error")
        if models[model].get(metric) is not None
    ]
    figures += [
        {"type": f"student.{task}.{metric}", "value": f"{found['value']:.6g}"}
        for task, by_model in facts.metrics.get("tasks", {}).items()
        for metric, found in by_model["student"].items()
        if metric != "by_language"
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": facts.architecture["model_type"],
            "modelArchitecture": facts.architecture["architectures"][0],
            "datasets": [{"ref": ref} for ref in datasets],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": figures},
        "considerations": {
            "useCases": [facts.config.description or "text generation"],
            "technicalLimitations": [
                "A small model: fluent sentences can be false. See README.md.",
                "Trained and measured on the listed data sets only.",
            ],
        },
    }


def _licenses(expression: str) -> Iterable[License]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(expression)]


def _hashes(sha256: str) -> list[HashType]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _properties(values: dict[str, object]) -> list[Property]:
    from cyclonedx.model import Property

    return [Property(name=k, value=str(v)) for k, v in values.items() if v is not None]


def _installed(name: str) -> list[tuple[str, str | None]]:
    """Version and stated licence of a distribution; empty if it is not installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return []
    stated = found.json.get("license_expression")
    return [(found["Version"], str(stated) if stated else None)]
