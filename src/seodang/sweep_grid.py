"""What a sweep varies: the combinations of the listed values, each a checked recipe with a name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seodang.artifact import sha256_bytes
from seodang.errors import InputError
from seodang.recipe import Recipe
from seodang.recipe_file import load_recipe

AS_IN_THE_RECIPE = "as-in-the-recipe"
MAX_NAME = 120  # characters of a student's directory

_SECTIONS = ("student", "soft_labels")
_ESTIMATOR = "soft_labels.estimator"
_OF_AN_ESTIMATOR = ("soft_labels.k", "soft_labels.threshold", "soft_labels.draws")


@dataclass(frozen=True)
class Variant:
    """One student of a sweep: what is varied, by key, and the whole recipe with it."""

    varied: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The student's name, and its directory's."""
        return _name(self.varied)

    @property
    def labels(self) -> str:
        """The name of its soft labels, which other students may share."""
        own = {key: value for key, value in self.varied.items() if _section(key) == "soft_labels"}
        return _name(own) or AS_IN_THE_RECIPE


def grid(recipe_file: Path, settings: list[str], vary: list[str]) -> list[Variant]:
    """Every combination of the values that ``vary`` lists, loaded and checked.

    Raises ``InputError`` for an item that is not ``section.key=value,value,...``, a key that
    cannot be varied, values that make the same student twice, a single student, and whatever
    :func:`seodang.recipe_file.load_recipe` refuses.
    """
    lists: dict[str, list[str]] = {}
    for item in vary:
        key, values = _read_item(item)
        for other in lists:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise InputError(f"--vary {item}: {other} is varied already")
        lists[key] = values
    variants = []
    for combination in itertools.product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        recipe = _load(recipe_file, settings, chosen)
        variants.append(Variant({key: _value(recipe, key, chosen[key]) for key in chosen}, recipe))
    if len(variants) < 2:
        raise InputError(
            "a sweep compares at least two students: list two or more values, such as "
            "--vary student.layers=6,10 (for one student: seodang run)"
        )
    for one, another in itertools.combinations(variants, 2):
        if one.recipe == another.recipe or one.name == another.name:
            raise InputError(f"--vary: {one.varied} and {another.varied} cannot be told apart")
    return variants


def _section(key: str) -> str:
    return key.partition(".")[0]


def _read_item(item: str) -> tuple[str, list[str]]:
    """The key and the values of ``section.key=value,value``, each as it is written."""
    key, equals, text = item.partition("=")
    if not (key and equals):
        raise InputError(f"--vary {item}: write it as section.key=value,value")
    if _section(key) not in _SECTIONS:
        raise InputError(
            f"--vary {item}: only keys of student and soft_labels can be varied: the students of "
            "a sweep share one corpus and one pass over the teacher"
        )
    if key.startswith("student.on_policy"):
        raise InputError(
            f"--vary {item}: a sweep trains from stored soft labels alone; the on-policy stage "
            "asks the teacher again for every student: use seodang run"
        )
    opening = "["
    try:
        node = yaml.compose(f"{opening}{text}]", Loader=yaml.SafeLoader)
        assert isinstance(node, yaml.SequenceNode)
        values = [
            text[n.start_mark.index - len(opening) : n.end_mark.index - len(opening)].strip()
            for n in node.value
        ]
    except (yaml.YAMLError, AssertionError):
        raise InputError(f"--vary {item}: the values are not a list of YAML values") from None
    if not values:
        raise InputError(f"--vary {item}: no value")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise InputError(f"--vary {item}: {twice} stands here twice")
    return key, values


def _load(recipe_file: Path, settings: list[str], chosen: Mapping[str, str]) -> Recipe:
    """The recipe with one combination of values."""
    varied = [f"{key}={value}" for key, value in chosen.items()]
    given = {setting.partition("=")[0] for setting in settings} | chosen.keys()
    # What the recipe says about its own estimator does not follow to another one.
    own = [f"{key}=null" for key in _OF_AN_ESTIMATOR if _ESTIMATOR in chosen and key not in given]
    try:
        return load_recipe(recipe_file, [*own, *settings, *varied])
    except InputError as error:
        message = str(error)
        for text in varied:
            message = message.replace(f"--set {text}", f"--vary {text}")
        if "has no meaning for the estimator" in message:
            message += (
                "; vary the section as a whole, such as "
                "--vary 'soft_labels={estimator: top-k, k: 8},{estimator: head-tail}'"
            )
        raise InputError(message) from None


def _value(recipe: Recipe, key: str, text: str) -> Any:
    """What was written, as a value; a number as the recipe reads it (YAML 1.1 knows no 1e-3)."""
    found: Any = recipe.model_dump()
    for part in key.split("."):
        found = found[part]
    if isinstance(found, int | float):
        return found
    # Where a model lies on this machine is nobody else's business.
    return Path(found).name if key == "student.path" and found else yaml.safe_load(text)


def _name(varied: Mapping[str, Any]) -> str:
    """A name for what is varied: ``layers-6,estimator-top-k``."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return "-".join(f"{key}-{words(inner)}" for key, inner in value.items())
        return "none" if value is None else str(value)

    keys = [key.partition(".")[2] for key in varied]
    parts = []
    for key, value in varied.items():
        short = key.partition(".")[2]
        label = key if keys.count(short) > 1 else short
        parts.append(f"{label}-{words(value)}" if label else words(value))
    name = re.sub(r"[^\w.,+-]+", "-", ",".join(parts), flags=re.ASCII).strip("-.")
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 9]}-{sha256_bytes(name.encode())[:8]}"
    return name
