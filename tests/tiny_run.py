"""A whole run in seconds for tests: synthetic documents, a tiny random teacher, the real code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tiny import tiny_teacher

WORDS = [
    "card",
    "payment",
    "refund",
    "order",
    "account",
    "balance",
    "interest",
    "phone",
    "signal",
    "network",
    "roaming",
    "invoice",
    "customer",
    "address",
    "delivery",
    "exchange",
    "return",
    "warranty",
    "statement",
    "transfer",
    "limit",
    "branch",
    "receipt",
]


def tiny_recipe(folder: Path, documents: int = 40, **changes: Any) -> Path:
    """Write documents, a teacher and a recipe below ``folder``; returns the recipe's path.

    ``changes`` replace keys of its sections, e.g. ``student={"epochs": 2}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    lines = []
    for number in range(documents):
        words = " ".join(rng.choice(WORDS, 60))
        lines.append(
            {"text": f"Notice {number}. {words}."}
            if number % 2
            else {
                "messages": [
                    {"role": "user", "content": f"What about {words[:40]}?"},
                    {"role": "assistant", "content": f"{words}."},
                ]
            }
        )
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "documents.jsonl").write_text(text)
    tiny_teacher(folder / "teacher")
    recipe: dict[str, Any] = {
        "name": "tiny",
        "corpus": {
            "sources": [{"name": "synthetic", "license": "CC0-1.0", "path": "documents.jsonl"}],
            "held_out": 0.25,
            "max_length": 64,
        },
        "teacher": {"path": "teacher", "license": "CC0-1.0"},
        "soft_labels": {"threshold": 0.1},
        "student": {
            "layers": 2,
            "epochs": 2,
            "batch_tokens": 256,
            "learning_rate": 3e-3,
            "checkpoint_steps": 3,
        },
        "evaluation": {"prompts": ["What about my card?"], "max_new_tokens": 4},
        "gate": {"beats": {"untrained": {}}},
        "release": {"name": "tiny-student", "license": "CC0-1.0", "parity_positions": 4},
    }
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def command(*arguments: str | Path) -> list[str]:
    """The command line of ``seodang`` with this interpreter."""
    return [sys.executable, "-m", "seodang", *map(str, arguments)]


def seodang(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``seodang`` to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment | options.pop("env", {}),
        check=False,
        timeout=options.pop("timeout", 300),
        **options,
    )


def digests(out: Path) -> dict[str, str]:
    """The identity of every stage of a finished run."""
    from seodang.artifact import Artifact

    stages = ("corpus", "soft-labels", "student", "cross-entropy", "evaluation", "release")
    return {stage: Artifact.open(out / stage).digest for stage in stages}
