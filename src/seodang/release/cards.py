"""The cards of a release, written from the artifacts' own facts: of the model, of its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.pages import card_environment, yaml_fences
from seodang.recipe import ReleaseConfig
from seodang.release.data import DOCUMENTS, SOFT_LABELS
from seodang.release.facts import Facts
from seodang.release.licenses import REASONS
from seodang.softlabels.card import license_metadata, size_category

if TYPE_CHECKING:
    from jinja2 import Environment

# Sizes of the template of the European Union, in tokens.
_SIZES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))
MODELS = {
    "teacher": "Teacher",
    "student": "**This model**",
    "cross_entropy": "Same start, same tokens, cross-entropy only",
    "untrained": "Untrained start",
    "before_on_policy": "This model before it was trained on its own words",
    "after_on_policy": "This model trained on its own words as well (not kept)",
}


def gguf_metadata(config: ReleaseConfig) -> dict[str, Any]:
    """What a GGUF file says about itself, in the words of a model card's front matter."""
    return {
        "license": config.license.lower(),
        "tags": ["seodang", "knowledge-distillation", "soft-labels", "gguf"],
        "pipeline_tag": "text-generation",
    }


def front_matter(facts: Facts) -> dict[str, Any]:
    """The metadata of the model card.

    Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    card = gguf_metadata(facts.config)
    if facts.config.languages:
        card["language"] = facts.config.languages
    if not facts.config.quantizations:
        card["tags"].remove("gguf")
    return {
        **card,
        "library_name": "transformers",
        "model_name": facts.config.name,
        "base_model": [teacher.name for teacher in facts.teachers],
    }


def model_card(facts: Facts) -> str:
    """README.md of a release, in Hugging Face's format."""
    template = _environment().get_template("README.md.j2")
    return yaml_fences(front_matter(facts)) + template.render(facts=facts, models=MODELS)


def data_card(facts: Facts) -> str:
    """DATA_CARD.md of a release: what the student was trained and evaluated on."""
    return _environment().get_template("DATA_CARD.md.j2").render(facts=facts)


def training_summary(facts: Facts) -> str:
    """TRAINING_DATA.md of a release, in the sections of the European Union's template."""
    tokens = facts.corpus.manifest.summary["tokens"]["train"]
    size = next(
        (words for limit, words in _SIZES if tokens < limit), "more than 10 trillion tokens"
    )
    template = _environment().get_template("TRAINING_DATA.md.j2")
    return template.render(facts=facts, size=size)


def data_set_card(facts: Facts) -> str:
    """README.md of the released data, in the format of Hugging Face's dataset cards."""
    assert facts.portion is not None
    classes = facts.portion["classes"]
    configs = []
    for name, counts in classes.items():
        parts = {name: (counts["documents"], f"{name}/{DOCUMENTS}")}
        parts |= {f"{name}-soft-labels": (counts["sequences"], f"{name}/{SOFT_LABELS}/*.parquet")}
        configs += [
            {"config_name": part, "data_files": [{"split": "train", "path": files}]}
            for part, (rows, files) in parts.items()
            if rows
        ]
    released = [source for source in facts.portion["sources"] if source["released"]]
    rows = sum(counts["documents"] + counts["sequences"] for counts in classes.values())
    metadata = {
        "pretty_name": f"Training data of {facts.config.name}",
        **license_metadata({source["license"] for source in released}),
        **({"language": facts.config.languages} if facts.config.languages else {}),
        "task_categories": ["text-generation"],
        "tags": ["seodang", "knowledge-distillation", "soft-labels"],
        "size_categories": [size_category(rows)],
        "configs": configs,
    }
    template = _environment().get_template("DATA_SET.md.j2")
    body = template.render(
        facts=facts,
        portion=facts.portion,
        released=released,
        reasons=REASONS,
        labelled=[name for name, counts in classes.items() if counts["sequences"]],
    )
    return yaml_fences(metadata) + body


def _environment() -> Environment:
    environment = card_environment(Path(__file__).parent / "templates")
    environment.filters["figure"] = _figure
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.1f} MB"
    environment.filters["millions"] = lambda count, unit="million": f"{count / 1e6:,.1f} {unit}"
    return environment


def _figure(by_model: dict[str, Any], model: str, metric: str) -> str:
    """A model's figure at a task, with its confidence interval; a dash if it was not measured."""
    found = by_model.get(model, {}).get(metric) or {"value": None}
    if found["value"] is None:
        return "–"
    return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"
