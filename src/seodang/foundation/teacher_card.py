"""The card of a teacher that was built from raw text: README.md beside its weights.

It is the report of the road: shape, held-out loss, load of the experts, both modes after every step
of the post-training, and what it was trained on. Format of the front matter:
https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seodang.artifact import Source
from seodang.foundation.planning.parameters import active_parameters, total_parameters
from seodang.foundation.recipe import FoundationRecipe
from seodang.pages import card_environment, yaml_fences

CARD = "README.md"
TEMPLATE = "teacher_card.md.j2"
VERSION = 1  # raised when the same teacher would get another card than before


def teacher_card(
    recipe: FoundationRecipe, report: dict[str, Any], sources: Sequence[Source]
) -> str:
    """The card of the teacher that ``recipe`` built.

    ``report`` is that of ``teacher.json``: ``pretraining`` and the rows of ``post_training``, which
    may be none. No licence is named for the weights: it has to follow from those of ``sources``.
    """
    languages = [k for k in report["pretraining"]["held_out_nats_per_byte"] if len(k) == 2]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": recipe.name,
        "language": sorted(languages),
        "tags": ["seodang", "axk1", "mixture-of-experts"],
    }
    template = card_environment(Path(__file__).parent).get_template(TEMPLATE)
    return yaml_fences(front) + template.render(
        recipe=recipe,
        model=recipe.model,
        parameters=total_parameters(recipe.model),
        active=active_parameters(recipe.model),
        pretraining=report["pretraining"],
        steps=report["post_training"],
        sources=sources,
    )
