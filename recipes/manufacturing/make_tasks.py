"""python recipes/manufacturing/make_tasks.py --out runs/manufacturing/tasks [--quick]

Two tasks of a factory's maintenance and safety desk, in Korean:

- ``work_order`` (json): a report becomes a work order or an incident: its type, cause, part and
  action. The types are terms of the maintenance register (ontocraft-check), the parts those of the
  railway's catalogue (korail-mcp); the reports are made, from ``wording.yaml``, and the held-out
  ones name parts, or say it in ways, that no training report does. The accident alerts of the
  Occupational Safety and Health Agency (safety-law-mapper) are real: those before May 2026 are for
  training, later ones are held out. Their cause is the alert's own; the part is the thing in the
  title that ``wording.yaml`` lists, and no action is reported.
- ``accident_type`` (choice): an alert's site and work, without the words at the end that say what
  happened; which accident was it? All real, split by the same date.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from seodang.corpus.task_writing import apart, example, open_packages, script_options, write_task
from seodang.corpus.tasks import Example
from seodang.packages import Package

HERE = Path(__file__).parent
CATALOGUE = "gateway/_bundled/m-procurement/data/g2b_item.csv"
ALERTS = "safety_law_mapper/data/incidents/kosha-alerts.jsonl"
TERMS = "ontocraft_check/data/registry/maint.json"
HELD_OUT_FROM = "2026-05"
SYSTEM = "정비·재해 보고를 JSON으로 옮기세요: type, cause, part, action."
ACCIDENTS = ["떨어짐", "깔림", "끼임", "맞음", "부딪힘"]
OTHER_ACCIDENT = "그 밖의 재해"
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
    options = script_options(__doc__, "a tenth of the made reports")
    share = 0.1 if options.quick else 1.0
    wording = yaml.safe_load((HERE / "wording.yaml").read_text("utf-8"))
    packages = open_packages(HERE / "packages.yaml")
    check_terms(wording, packages["ontocraft-check"])
    alerts = read_alerts(packages["safety-law-mapper"])
    reports = Reports(wording, packages["korail-mcp"])
    train = [reports.make("train", "train") for _ in range(int(2200 * share))]
    held_out = [
        reports.make(words, parts)
        for words, parts in (("train", "held_out"), ("held_out", "train"), ("held_out",) * 2)
        for _ in range(int(120 * share))
    ]
    for alert in alerts:
        side = held_out if alert["posted_at"] >= HELD_OUT_FROM else train
        side.append(incident(alert, wording["objects"]))
    random.Random("order of the reports").shuffle(train)
    write_task(options.out, "work_order", *apart(train, held_out))
    (options.out / "work_order.schema.json").write_text(
        json.dumps(schema(wording, alerts), ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    sides: dict[bool, list[Example]] = {True: [], False: []}
    for alert in alerts:
        sides[alert["posted_at"] >= HELD_OUT_FROM].extend(accident(alert))
    write_task(options.out, "accident_type", *apart(sides[False], sides[True]))


def schema(wording: dict[str, Any], alerts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a work order or an incident is: all but the part are terms to choose from."""
    causes = [*wording["symptoms"], *sorted({alert["accident_type"][0] for alert in alerts})]
    none = {"type": "null"}
    properties = {
        "type": {"enum": [*wording["types"], "재해"]},
        "cause": {"enum": causes},
        "part": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 24}, none]},
        "action": {"anyOf": [{"enum": list(wording["actions"])}, none]},
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
        apart_draw = random.Random("parts held out")
        for family in wording["families"]:
            ends = re.compile(family["names"] + "$")
            parts = [name for code, name in named if code in family["codes"] and ends.search(name)]
            parts = [name for name in dict.fromkeys(parts) if "또는" not in name]
            held_out = set(apart_draw.sample(parts, len(parts) // 4))
            sides = {"train": [p for p in parts if p not in held_out], "held_out": sorted(held_out)}
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
            draw.choice(ways[words if i == new or draw.random() < 0.5 else "train"])
            for i, ways in enumerate(told)
        ]
        sentences.insert(draw.choice([0, 0, 1, 2]), sentences.pop())
        if draw.random() < 0.45 and other != part:
            sentences.insert(draw.randint(0, 3), draw.choice(wording["asides"][words]))
        text = " ".join(filter(None, (_filled(sentence, named) for sentence in sentences)))
        machine = draw.choice(self.machines)
        head = draw.choice(wording["heads"]) + draw.choice(["", f"{machine} ", f"{machine}: "])
        order = {"type": kind, "cause": cause, "part": part, "action": action}
        group = f"{words} words, {parts} parts"
        return example(
            head + text,
            json.dumps(order, ensure_ascii=False),
            system=SYSTEM,
            group=group.replace("train", "known").replace("held_out", "new"),
            **MADE,
        )


def read_alerts(package: Package) -> list[dict[str, Any]]:
    """The alerts that have an accident type, oldest first."""
    alerts = [json.loads(line) for line in package.read(ALERTS).splitlines()]
    alerts = [alert for alert in alerts if alert["accident_type"]]
    return sorted(alerts, key=lambda alert: (alert["posted_at"], alert["pst_no"]))


def incident(alert: dict[str, Any], objects: list[str]) -> Example:
    """An alert as a report: the accident's type is its cause, and no action is told."""
    title = " ".join(alert["title"].split())
    thing = max((name for name in objects if name in title), key=len, default=None)
    answer = {"type": "재해", "cause": alert["accident_type"][0], "part": thing, "action": None}
    answer_text = json.dumps(answer, ensure_ascii=False)
    return example(title, answer_text, system=SYSTEM, group="accident alert", **ALERT)


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


def _filled(template: str, named: dict[str, str]) -> str:
    """The template with its names and their particles: 이 or 가, 은 or 는."""

    def fill(match: re.Match[str]) -> str:
        name = named[match[1]]
        coda = "가" <= name[-1] <= "힣" and (ord(name[-1]) - 0xAC00) % 28
        other = {"이": "가", "은": "는", None: ""}[match[2]]
        return name + ((match[2] if coda else other) or "")

    return re.sub(r"\{(\w)(?::(.))?\}", fill, template)


if __name__ == "__main__":
    main()
