"""python recipes/manufacturing/make_tasks.py --out runs/manufacturing/tasks [--quick]

Two tasks of a factory's maintenance and safety desk, in Korean:

- ``work_order`` (json): a report becomes a work order or an incident: its type, cause, part and
  action. All of these are terms to choose from: the types those of the maintenance register
  (ontocraft-check); the part is the kind of a part that the railway's catalogue (korail-mcp) names.
  The reports are made, from ``wording.yaml``, and the held-out ones name parts, of known kinds, or
  say it in ways, that no training report does. The accident alerts of the Occupational Safety and
  Health Agency (safety-law-mapper) are real: those before May 2026 are for training, later ones are
  held out. Their cause is the alert's own; the part is the kind of thing in the title that
  ``wording.yaml`` lists, and no action is reported. Of the made reports to train on some are
  mistyped, so that what is learned does not hang on single tokens. Eleven of twelve reports to
  train on come without an answer, as reports do.
- ``accident_type`` (choice): an alert's site and work, without the words at the end that say what
  happened; which accident was it? All real, split by the same date.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from seodang.corpus.task_writing import (
    apart,
    example,
    open_packages,
    script_options,
    user_text,
    write_task,
)
from seodang.corpus.tasks import Example
from seodang.evaluation.perturb import spacing, typos
from seodang.packages import Package

HERE = Path(__file__).parent
CATALOGUE = "gateway/_bundled/m-procurement/data/g2b_item.csv"
ALERTS = "safety_law_mapper/data/incidents/kosha-alerts.jsonl"
TERMS = "ontocraft_check/data/registry/maint.json"
HELD_OUT_FROM = "2026-05"
ACCIDENTS = ["떨어짐", "깔림", "끼임", "맞음", "부딪힘"]
ACCIDENT = "재해"  # what is reported, if not work to do
OTHER_ACCIDENT = "그 밖의 재해"
PARTICLES = {"이": "가", "은": "는", "을": "를", "과": "와", "으로": "로", "이라": "라"}
RIEUL = 8  # the number of the consonant ㄹ at a syllable's end
LABELLED = 12  # one of so many reports to train on has its answer; others wait for the teacher's
MISTYPED = 0.3
MADE: Any = {
    "source": "Made from parts of korail-mcp 1.0.1 and terms of the OntoCraft register (CC BY 4.0)",
    "license": "LicenseRef-data.go.kr AND CC-BY-4.0",
    "language": "ko",
    "synthetic": True,
}
ALERT: Any = {
    "source": "KOSHA accident alerts, by way of safety-law-mapper 0.3.0",
    "license": "CC-BY-4.0",
    "language": "ko",
    "synthetic": False,
}


def main() -> None:
    """Write both tasks and the schema of the first."""
    options = script_options(__doc__, "a twenty-fifth of the made reports")
    share = 0.04 if options.quick else 1.0
    wording = yaml.safe_load((HERE / "wording.yaml").read_text("utf-8"))
    packages = open_packages(HERE / "packages.yaml")
    check_terms(wording, packages["ontocraft-check"])
    alerts = read_alerts(packages["safety-law-mapper"])[:: 4 if options.quick else 1]
    reports = Reports(wording, packages["korail-mcp"])
    train = [reports.make("train", "train") for _ in range(int(20000 * share))]
    train += [reports.accident() for _ in range(int(4000 * share))]
    train = as_typed(train)
    held_out = [
        reports.make(words, parts)
        for words, parts in (("train", "held_out"), ("held_out", "train"), ("held_out",) * 2)
        for _ in range(int(120 * share))
    ]
    for alert in alerts:
        side = held_out if alert["posted_at"] >= HELD_OUT_FROM else train
        side.append(incident(alert, wording["things"]))
    random.Random("order of the reports").shuffle(train)
    write_task(options.out, "work_order", *apart(train, held_out), LABELLED)
    (options.out / "work_order.schema.json").write_text(
        json.dumps(schema(wording, reports, alerts), ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    sides: dict[bool, list[Example]] = {True: [], False: []}
    for alert in alerts:
        sides[alert["posted_at"] >= HELD_OUT_FROM].extend(accident(alert))
    write_task(options.out, "accident_type", *apart(sides[False], sides[True]))


def as_typed(reports: list[Example]) -> list[Example]:
    """The same reports, a share of them with slips of the finger or without half the spaces."""
    rng = np.random.default_rng(len(reports))
    typed = []
    for report in reports:
        text = user_text(report)
        if rng.random() < MISTYPED:
            text = (typos, spacing)[int(rng.integers(2))](text, rng)
        typed.append(example(text, report.answer, group=report.group, **MADE))
    return typed


def schema(
    wording: dict[str, Any], reports: Reports, alerts: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a work order or an incident is: terms to choose from, and null for what is not told."""
    accidents = sorted({*wording["accidents"], *(alert["accident_type"][0] for alert in alerts)})
    properties = {
        "type": {"enum": [*wording["types"], ACCIDENT]},
        "cause": {"enum": [*wording["symptoms"], *accidents]},
        "part": {"enum": [*dict.fromkeys(reports.kind_of.values()), *wording["things"], None]},
        "action": {"enum": [*wording["actions"], None]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def check_terms(wording: dict[str, Any], register: Package) -> None:
    """The types of work are terms of the register, under the names that it gives them."""
    terms = {term["ko"] for term in json.loads(register.read(TERMS))["terms"]}
    assert terms.issuperset(wording["types"]), set(wording["types"]) - terms


class Reports:
    """Made reports of maintenance."""

    def __init__(self, wording: dict[str, Any], catalogue: Package) -> None:
        self.wording = wording
        self.draw = random.Random("reports")
        rows = list(csv.DictReader(catalogue.read(CATALOGUE).decode("utf-8-sig").splitlines()))
        named = sorted({(row["G2B분류번호"][:4], row["G2B품명"]) for row in rows})
        named = [(code, name) for code, name in named if re.fullmatch("[가-힣]{2,9}", name)]
        self.machines = [name for _, name in named if re.search(wording["machines"] + "$", name)]
        self.families: list[tuple[dict[str, list[str]], list[str]]] = []
        self.kind_of: dict[str, str] = {}
        apart_draw = random.Random("parts held out")
        for family in wording["families"]:
            sides: dict[str, list[str]] = {"train": [], "held_out": []}
            for kind in family["kinds"]:
                parts = [n for c, n in named if c in family["codes"] and n.endswith(kind)]
                parts = [name for name in dict.fromkeys(parts) if "또는" not in name]
                self.kind_of |= dict.fromkeys(parts, kind)
                held_out = set(apart_draw.sample(parts, len(parts) // 4))
                sides["train"] += [name for name in parts if name not in held_out]
                sides["held_out"] += sorted(held_out)
            self.families.append((sides, family["causes"]))

    def make(self, words: str, parts: str) -> Example:
        """One report, with wording of the side ``words`` about a part of the side ``parts``."""
        draw, wording = self.draw, self.wording
        weights = [len(sides[parts]) ** 0.5 for sides, _ in self.families]
        sides, causes = draw.choices(self.families, weights)[0]
        part: str | None = draw.choice(sides[parts])
        other = draw.choice(draw.choice(self.families)[0]["train"])
        cause, kind = draw.choice(causes), draw.choice(list(wording["types"]))
        action = draw.choice(wording["remedies"][cause]) if draw.random() < 0.9 else None
        if parts == "train" and draw.random() < 0.07:
            part = None
        named = {"p": part or draw.choice(wording["unknown_part"]), "q": other}
        told = [
            wording["symptoms"][cause],
            wording["actions"][action] if action else wording["no_action"],
            wording["types"][kind],
        ]
        # In new words is one sentence at least, and each of the others as often as not.
        new = draw.randrange(len(told)) if words == "held_out" else -1
        sentences = [
            _chosen(ways[words if i == new or draw.random() < 0.5 else "train"], draw)
            for i, ways in enumerate(told)
        ]
        sentences.insert(draw.choice([0, 0, 1, 2]), sentences.pop())
        if draw.random() < 0.3 and other != part:
            sentences.insert(draw.randint(0, 3), draw.choice(wording["asides"][words]))
        text = " ".join(filter(None, (_filled(sentence, named, draw) for sentence in sentences)))
        machine = draw.choice(self.machines)
        head = draw.choice(wording["heads"]) + draw.choice(["", "", f"{machine}: "])
        kind_of_part = None if part is None else self.kind_of[part]
        order = {"type": kind, "cause": cause, "part": kind_of_part, "action": action}
        group = f"{words} words, {parts} parts".replace("train", "known").replace("held_out", "new")
        return _report(head + text, order, group=group, **MADE)

    def accident(self) -> Example:
        """One report of an accident, to train on: measured are the real alerts."""
        draw, wording = self.draw, self.wording
        cause = draw.choice(ACCIDENTS if draw.random() < 0.7 else list(wording["accidents"]))
        told = wording["accidents"][cause]
        thing = draw.choice(told["things"]) if told["things"] and draw.random() < 0.8 else None
        name = draw.choice(wording["things"][thing] if thing else wording["nothing"])
        way = draw.choice(told["ways"])
        text = _filled(way, {"p": name, "w": draw.choice(wording["works"])}, draw)
        order = {"type": ACCIDENT, "cause": cause, "part": thing, "action": None}
        return _report(draw.choice(wording["accident_heads"]) + text, order, **MADE)


def read_alerts(package: Package) -> list[dict[str, Any]]:
    """The alerts that have an accident type, oldest first."""
    alerts = [json.loads(line) for line in package.read(ALERTS).splitlines()]
    alerts = [alert for alert in alerts if alert["accident_type"]]
    return sorted(alerts, key=lambda alert: (alert["posted_at"], alert["pst_no"]))


def incident(alert: dict[str, Any], things: dict[str, list[str]]) -> Example:
    """An alert as a report: the accident's type is its cause, and no action is told."""
    title = " ".join(alert["title"].split())
    named = {name: thing for thing, names in things.items() for name in names if name in title}
    thing = named[max(named, key=len)] if named else None
    order = {"type": ACCIDENT, "cause": alert["accident_type"][0], "part": thing, "action": None}
    return _report(title, order, group="accident alert", **ALERT)


def _report(text: str, order: dict[str, str | None], **credit: Any) -> Example:
    return example(text, json.dumps(order, ensure_ascii=False), **credit)


def accident(alert: dict[str, Any]) -> Iterator[Example]:
    """The alert without its place, its date and its last word, which says what happened."""
    work, _, last = " ".join(alert["title"].split("]")[-1].split()).rpartition(" ")
    kind = alert["accident_type"][0]
    if len(work) < 6 or not last.startswith(kind[:2]):
        return
    choices = [*ACCIDENTS, OTHER_ACCIDENT]
    yield example(
        f"사업장: {alert['site_type']}\n상황: {work}",
        kind if kind in ACCIDENTS else OTHER_ACCIDENT,
        system="이 상황에서 일어난 재해의 유형을 고르세요: " + ", ".join(choices),
        choices=choices,
        **ALERT,
    )


def _chosen(ways: list[str], draw: random.Random) -> str:
    """One of the templates; those that can be filled in many ways come more often."""
    choices = [re.findall(r"\[([^\[\]]+)\]", way) for way in ways]
    weights = [math.prod(group.count("|") + 1 for group in groups) ** 0.5 for groups in choices]
    return draw.choices(ways, weights)[0]


def _filled(template: str, named: dict[str, str], draw: random.Random) -> str:
    """The template with one of each choice, its names, and the particles that fit behind them."""

    def choose(match: re.Match[str]) -> str:
        return _with_particle(draw.choice(match[1].split("|")), match[2])

    def fill(match: re.Match[str]) -> str:
        return _with_particle(named[match[1]], match[2])

    behind = "|".join(sorted(PARTICLES, key=len, reverse=True))
    chosen = re.sub(rf"\[([^\[\]]+)\](?:({behind})(?![가-힣]))?", choose, template)
    return re.sub(rf"\{{(\w)(?::({behind}))?\}}", fill, chosen)


def _with_particle(name: str, particle: str | None) -> str:
    """``particle`` is the form that stands behind a consonant."""
    coda = "가" <= name[-1] <= "힣" and (ord(name[-1]) - 0xAC00) % 28
    if particle is None or (coda and (coda, particle) != (RIEUL, "으로")):
        return name + (particle or "")
    return name + PARTICLES[particle]


if __name__ == "__main__":
    main()
