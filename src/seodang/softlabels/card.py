"""The data card of a store: README.md, in the format of Hugging Face's dataset cards.

Source of the front matter: https://huggingface.co/docs/hub/datasets-cards and
https://huggingface.co/docs/hub/datasets-manual-configuration; of the licence names:
https://huggingface.co/docs/hub/repositories-licenses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from seodang.artifact import Source
from seodang.pages import card_environment, yaml_fences
from seodang.softlabels.estimators import BIASED
from seodang.softlabels.shards import StoreHeader

CARD = "README.md"
TEMPLATE = "card.md.j2"
IMPORTED = "imported:"  # how the header's teacher begins if the labels came from a file

_UNSTATED = frozenset({"", "not stated", "see the package", "unknown"})

# Licences that the Hub names as SPDX does, in lower case; any other is "other" there.
_ON_THE_HUB = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 "
    "cc-by-sa-4.0 cc0-1.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gemma gpl-2.0 gpl-3.0 isc "
    "lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 mit mpl-2.0 ms-pl ncsa "
    "odbl odc-by ofl-1.1 openrail osl-3.0 pddl postgresql unlicense wtfpl zlib"
)
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
_ESTIMATORS = {
    "top-k": "the {k} most likely ids at each position, with their probabilities; biased, as the "
    "rest of the distribution is ignored",
    "residual": "the {k} most likely ids at each position, with their probabilities, and one "
    "bucket for all the others; its divergence is a lower bound of the full one",
    "sampled": "{draws} draws at each position; the weight of an id is its share of the draws, "
    "right on average and not each by itself",
    "head-tail": "the likely ids of each position with their probabilities, and some of the "
    "others by chance, weighted so that the weights are right on average",
}


def data_card(
    header: StoreHeader,
    summary: dict[str, Any],
    sources: Sequence[Source],
    notes: Sequence[str] = (),
) -> str:
    """README.md of a store: what it holds, whose it is, what it may be used for, how to load it.

    ``summary`` is that of the manifest: its ``tokens`` and ``sequences`` are needed; ``sources``
    are documents and teacher with their licences; ``notes`` are further paragraphs of what a user
    must know. What is allowed follows from the licences, which are stated and not interpreted.
    Equal input gives equal text.
    """
    template = card_environment(Path(__file__).parent).get_template(TEMPLATE)
    body = template.render(
        header=header,
        summary=summary,
        sources=sources,
        notes=notes,
        unstated=[source.name for source in sources if _unstated(source.license)],
        estimator=_ESTIMATORS[header.estimator].format_map(header.parameters),
        biased=header.estimator in BIASED,
        imported=header.teacher.startswith(IMPORTED),
    )
    return yaml_fences(front_matter(summary, sources)) + body


def front_matter(summary: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """The card's metadata; ``datasets.load_dataset`` finds the shards by it."""
    return {
        **license_metadata({source.license for source in sources}),
        "task_categories": ["text-generation"],
        "tags": ["seodang", "knowledge-distillation", "soft-labels"],
        "size_categories": [size_category(summary["sequences"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "labels-*.parquet"}],
            }
        ],
    }


def license_metadata(names: Set[str]) -> dict[str, Any]:
    """``license``, and ``license_name`` for those that the Hub does not know, of these licences."""
    names = names or {""}
    listed = sorted({_hub_name(name) for name in names})
    others = sorted(name for name in names if _hub_name(name) == "other")
    return {
        "license": listed[0] if len(listed) == 1 else listed,
        **({"license_name": " AND ".join(others)} if others else {}),
    }


def size_category(rows: int) -> str:
    """The Hub's name for the size of a data set of so many rows."""
    return _SIZES[next((i for i in range(len(_SIZES)) if rows < 10 ** (i + 3)), -1)]


def _unstated(license_name: str) -> bool:
    return license_name.strip().lower() in _UNSTATED


def _hub_name(license_name: str) -> str:
    if _unstated(license_name):
        return "unknown"
    name = re.sub("-(only|or-later)$", "", license_name.strip().lower())
    return name if name in _ON_THE_HUB.split() else "other"
