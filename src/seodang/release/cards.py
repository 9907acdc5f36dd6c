"""The model card (README.md) and the data card, written from the artifacts' own facts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.recipe import ReleaseConfig
from seodang.release.facts import Facts
from seodang.release.gguf import yaml_fences

if TYPE_CHECKING:
    from jinja2 import Environment

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


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["number"] = _number
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.1f} MB"
    environment.filters["millions"] = lambda count, unit="million": f"{count / 1e6:,.1f} {unit}"
    return environment


def _cell(value: object) -> str:
    """Text for one cell of a Markdown table."""
    return "–" if value is None else " ".join(str(value).replace("|", "\\|").split())


def _number(value: float | None, form: str = ",.3f") -> str:
    """A measured number; a dash if it was not measured."""
    return "–" if value is None else format(value, form)
