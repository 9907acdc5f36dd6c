"""python recipes/mobility/make_tasks.py --out runs/mobility/tasks [--quick]

Two tasks of a travel assistant:

- ``trip_query`` (json): a request in Korean or English becomes a trip query that
  ``trip_query.schema.json`` admits: what is wanted (a trip, a distance, the lines of a station),
  from where to where, when, for how many. The stations, the lines and which stations a train
  connects are those of Korea's railways (korail-mcp); the wording is made, from ``wording.yaml``.
  Held out are stations, and ways of saying it, that no training request has. Four of five
  requests to train on come without an answer, as requests do.
- ``tool`` (choice): what a driver or traveller says, and the function that serves it. Held out are
  the turns of the Berkeley Function Calling Leaderboard's dialogues (bfcl-eval) that one function
  of its vehicle and travel interfaces answers, as people wrote them; the training side is made.
"""

from __future__ import annotations

import calendar
import csv
import gzip
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from romanise import romanise

from seodang.corpus.task_writing import (
    apart,
    example,
    open_packages,
    script_options,
    write_task,
)
from seodang.corpus.tasks import Example
from seodang.packages import Package
from seodang.recipe import Language

HERE = Path(__file__).parent
DATA = "gateway/_bundled/"
KORAIL: Any = {
    "source": "Made from stations of korail-mcp 1.0.1 (Korea Railroad Corporation)",
    "license": "LicenseRef-data.go.kr",
    "synthetic": True,
}
BFCL: Any = {"source": "BFCL multi-turn dialogues, bfcl-eval 2026.3.23", "license": "Apache-2.0"}
DIALOGUES = "bfcl_eval/data/{}BFCL_v4_multi_turn_{}.json"
SYSTEM = {
    "ko": "승객의 요청을 JSON으로 옮기세요: intent, origin, destination, date, time, passengers.",
    "en": "Put the request into JSON: intent, origin, destination, date, time, passengers.",
}
NATIVE_HOURS = [
    "한",
    "두",
    "세",
    "네",
    "다섯",
    "여섯",
    "일곱",
    "여덟",
    "아홉",
    "열",
    "열한",
    "열두",
]
LABELLED = 5  # one of so many trip requests has its answer; the others wait for the teacher's
LOWER_CASE = 0.25  # of the English requests to train on: many travellers type no capitals
# Calls that only prepare the one that answers the turn.
PREPARING = {
    "authenticate_travel", "compute_exchange_rate", "displayCarStatus", "get_flight_cost",
    "get_nearest_airport_by_city", "get_zipcode_based_on_city", "lockDoors", "pressBrakePedal",
    "register_credit_card",
}  # fmt: skip


def main() -> None:
    """Write both tasks and the schema of the first."""
    options = script_options(__doc__, "a fiftieth of the examples, twice that of those held out")
    share = 0.02 if options.quick else 1.0
    wording = yaml.safe_load((HERE / "wording.yaml").read_text("utf-8"))
    packages = open_packages(HERE / "packages.yaml")
    railway = Railway(packages["korail-mcp"])
    train, held_out = [], []
    for language, of_train, of_held_out in (("ko", 1800, 330), ("en", 2000, 270)):
        requests = Requests(railway, wording[language], language)
        train += [requests.make("train", "train") for _ in range(int(of_train * share))]
        for words, stations in (("train", "held_out"), ("held_out", "train"), ("held_out",) * 2):
            count = int(of_held_out * min(1.0, 2 * share) / 3)
            held_out += [requests.make(words, stations) for _ in range(count)]
    train, held_out = apart(train, held_out, threshold=0.9)
    write_task(options.out, "trip_query", train, held_out, LABELLED)
    (options.out / "trip_query.schema.json").write_text(
        json.dumps(railway.schema(), ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    turns = spoken_turns(packages["bfcl-eval"], sorted(wording["functions"]))
    made = made_turns(wording["functions"], wording["slots"], int(75 * share))
    write_task(options.out, "tool", *apart(made, turns[:: 10 if options.quick else 1]))


class Railway:
    """The stations of today's lines, and which of them a train connects."""

    def __init__(self, package: Package) -> None:
        lines = _rows(package.read(DATA + "m-network/data/segment_detail.csv"))
        distances = _rows(
            gzip.decompress(package.read(DATA + "m-network/data/station_distance.csv.gz"))
        )
        metro = json.loads(package.read(DATA + "m-urban-rail/data/stations.json"))
        current = {_bare(row["역명"]) for row in lines}
        self.pairs = sorted(
            (a, b)
            for row in distances
            if 15 < float(row["여객최단운행거리"] or 0) < 900 and row["구간거리내용"].strip()
            for a, b in [(_bare(row["출발역명"]), _bare(row["도착역명"]))]
            if a in current and b in current
        )
        by_line: dict[tuple[str, str], set[str]] = defaultdict(set)
        for station in metro:
            by_line[station["opr"], station["ln"]].add(_bare(station["stinNm"]))
        self.lines = [sorted(names) for _, names in sorted(by_line.items()) if len(names) > 3]
        self.metro = sorted(set().union(*self.lines))
        self.stations = sorted({name for pair in self.pairs for name in pair} | set(self.metro))
        draw = random.Random("stations held out")
        self.held_out = set(draw.sample(self.stations, len(self.stations) // 5))

    def on_side(self, names: tuple[str, ...], side: str) -> bool:
        """Whether a request may name these stations: held-out ones have one that is held out."""
        return any(name in self.held_out for name in names) == (side == "held_out")

    def schema(self) -> dict[str, Any]:
        """What a trip query is: stations are those that there are."""
        names = [*self.stations, *sorted(set(map(romanise, self.stations)))]
        none = {"type": "null"}
        day = "today|tomorrow|day_after_tomorrow|monday|tuesday|wednesday|thursday|friday|saturday"
        date = f"^({day}|sunday|(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]))$"
        clock = "^([01][0-9]|2[0-3]):[0-5][0-9]$"
        properties = {
            "intent": {"enum": ["trip", "distance", "line"]},
            "origin": {"$ref": "#/$defs/station"},
            "destination": {"anyOf": [{"$ref": "#/$defs/station"}, none]},
            "date": {"anyOf": [{"type": "string", "pattern": date}, none]},
            "time": {"anyOf": [{"type": "string", "pattern": clock}, none]},
            "passengers": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, none]},
        }
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
            "$defs": {"station": {"enum": names}},
        }


class Requests:
    """Made requests of one language."""

    def __init__(self, railway: Railway, wording: dict[str, Any], language: Language) -> None:
        self.railway = railway
        self.wording = wording
        self.language = language
        self.draw = random.Random(f"trip requests, {language}")

    def make(self, words: str, stations: str) -> Example:
        """One request: templates of the side ``words``, stations of the side ``stations``."""
        draw = self.draw
        intent = draw.choices(["trip", "distance", "line"], [8, 1, 1])[0]
        names = self._names(intent, stations)
        query: dict[str, Any] = dict.fromkeys(
            ("intent", "origin", "destination", "date", "time", "passengers")
        )
        query |= {"intent": intent, **dict(zip(("origin", "destination"), names, strict=False))}
        when = people = ""
        if intent == "trip":
            if draw.random() < 0.85:
                query["date"], when = self._day()
            if draw.random() < 0.7:
                query["time"], clock = self._clock()
                when = f"{when} {clock}"
            if draw.random() < 0.75:
                query["passengers"] = draw.choices(range(1, 9), [6, 8, 4, 4, 2, 1, 1, 1])[0]
                people = draw.choice(self.wording["people"][query["passengers"]])
        template = draw.choice(self.wording[intent][words])
        said = {key: self._said(name) for key, name in zip("od", names, strict=False)}
        text = re.sub(
            r"\{(\w+)(?::(.))?\}",
            lambda m: {"when": when, "n": people, **said}[m[1]] + _particle(said.get(m[1]), m[2]),
            template,
        )
        text = _tidy(text, self.language)
        if self.language == "en" and stations == words == "train" and draw.random() < LOWER_CASE:
            text = text.lower()
        spelt = {key: self._name(query[key]) for key in ("origin", "destination") if query[key]}
        return example(
            user=text,
            answer=json.dumps(query | spelt, ensure_ascii=False),
            language=self.language,
            system=SYSTEM[self.language],
            group=f"{words} words, {stations} stations".replace("train", "known").replace(
                "held_out", "new"
            ),
            **KORAIL,
        )

    def _names(self, intent: str, side: str) -> tuple[str, ...]:
        railway = self.railway
        while True:
            names: tuple[str, ...]
            if intent == "line":
                names = (self.draw.choice(railway.metro),)
            elif intent == "distance" or self.draw.random() < 0.6:
                names = self.draw.choice(railway.pairs)
            else:
                names = tuple(self.draw.sample(self.draw.choice(railway.lines), 2))
            if railway.on_side(names, side):
                return names

    def _name(self, name: str) -> str:
        return name if self.language == "ko" else romanise(name)

    def _said(self, name: str) -> str:
        """The name as it is said; in Korean sometimes with the word for station."""
        return self._name(name) + (
            "역" if self.language == "ko" and self.draw.random() < 0.3 else ""
        )

    def _day(self) -> tuple[str, str]:
        if self.draw.random() < 0.75:
            day = self.draw.choice(list(self.wording["day"]))
            return day, self.draw.choice(self.wording["day"][day])
        month, day_ = self.draw.randint(1, 12), self.draw.randint(1, 28)
        if self.language == "ko":
            said = self.draw.choice(
                [f"{month}월 {day_}일", f"{month}/{day_}", f"{month}월{day_}일"]
            )
        else:
            said = self.draw.choice(["on {} {}", "on the {1}th of {0}" if day_ > 3 else "on {} {}"])
            said = said.format(calendar.month_name[month], day_)
            said = re.sub(
                r"(2[123])th", lambda m: m[1] + {"1": "st", "2": "nd", "3": "rd"}[m[1][1]], said
            )
        return f"{month:02}-{day_:02}", said

    def _clock(self) -> tuple[str, str]:
        hour, minute = (
            self.draw.randint(5, 22),
            self.draw.choice([0, 0, 0, 30, 30, 10, 15, 20, 45, 50]),
        )
        twelve = (hour - 1) % 12 + 1
        if self.language == "ko":
            part = "아침" if hour < 9 else "오전" if hour < 12 else "낮" if hour == 12 else "오후"
            part = {18: "저녁", 19: "저녁", 20: "저녁", 21: "밤", 22: "밤"}.get(hour, part)
            part = self.draw.choice([part, "오전" if hour < 12 else "오후"])
            minutes = (
                ""
                if not minute
                else " 반"
                if minute == 30 and self.draw.random() < 0.5
                else f" {minute}분"
            )
            spoken = self.draw.choice([f"{twelve}시", f"{NATIVE_HOURS[twelve - 1]} 시"])
            plain = f"{hour}:{minute:02}" if self.draw.random() < 0.5 else f"{hour}시{minutes}"
            said = plain if hour > 12 and self.draw.random() < 0.25 else f"{part} {spoken}{minutes}"
            return f"{hour:02}:{minute:02}", said + self.draw.choice(
                ["", "", "", "쯤", "경", " 이후"]
            )
        past = f"{twelve}:{minute:02}" if minute else str(twelve)
        part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
        said = self.draw.choice([
            f"at {past} {'am' if hour < 12 else 'pm'}",
            f"at {past}{'am' if hour < 12 else 'pm'}",
            f"around {past} in the {part}",
            f"at {hour}:{minute:02}" if hour > 12 else f"at {hour:02}:{minute:02}",
            f"after {past} {'a.m.' if hour < 12 else 'p.m.'}",
        ])  # fmt: skip
        return f"{hour:02}:{minute:02}", said


def spoken_turns(package: Package, functions: list[str]) -> list[Example]:
    """BFCL's user turns that one of ``functions`` answers."""
    interface = {
        json.loads(line)["name"]
        for name in ("vehicle_control", "travel_booking")
        for line in package.read(f"bfcl_eval/data/multi_turn_func_doc/{name}.json").splitlines()
    }
    said: dict[str, str] = {}
    for part in ("base", "miss_param", "miss_func"):
        answers = _json_lines(package.read(DIALOGUES.format("possible_answer/", part)))
        calls = {answer["id"]: answer["ground_truth"] for answer in answers}
        for dialogue in _json_lines(package.read(DIALOGUES.format("", part))):
            codes = calls[dialogue["id"]]
            for turn, code, previous in zip(
                dialogue["question"], codes, [["-"], *codes], strict=False
            ):
                called = [call.split("(")[0] for call in code]
                # Where nothing could be called before, the turn only adds what was missing.
                if not (turn and called and previous and interface.issuperset(called)):
                    continue
                if PREPARING.issuperset(set(called) - {called[-1]}):
                    said.setdefault(" ".join(turn[-1]["content"].split()), called[-1])
    return [
        _call(text, function, functions, **BFCL, synthetic=False)
        for text, function in said.items()
        if function in functions
    ]


def made_turns(
    templates: dict[str, list[str]], slots: dict[str, list[Any]], each: int
) -> list[Example]:
    """``each`` requests of every function, from the templates, politely or plainly."""
    draw = random.Random("tool requests")
    before = ["", "", "", "Hi, ", "Next, ", "By the way, ", "Great, thanks! ", "One more thing: "]
    before += ["Now that this is settled, ", "Before I leave, ", "When you have a moment: "]
    after = ["", "", "", " Thank you.", " I'm in a hurry.", " That would put my mind at ease."]
    made = []
    for function in sorted(templates):
        for _ in range(each):
            filled = draw.choice(templates[function]).format(
                **{slot: draw.choice(values) for slot, values in slots.items()}
            )
            opening = draw.choice(before)
            if opening.endswith((", ", ": ")) and not filled.startswith(("I ", "I'")):
                filled = filled[0].lower() + filled[1:]
            text = opening + filled + draw.choice(after)
            source = "Made for the functions of BFCL's interfaces"
            made.append(
                _call(text, function, sorted(templates), source, "Apache-2.0", synthetic=True)
            )
    draw.shuffle(made)
    return made


def _call(
    text: str, function: str, choices: list[str], source: str, license: str, synthetic: bool
) -> Example:
    system = "Name the function that serves the request: " + ", ".join(choices)
    return example(
        text,
        function,
        language="en",
        source=source,
        license=license,
        synthetic=synthetic,
        system=system,
        choices=choices,
    )


def _rows(table: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(table.decode("utf-8-sig").splitlines()))


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def _bare(station: str) -> str:
    """A station's name without what stands in brackets and without the word for station."""
    name = re.sub(r"\(.*?\)|\s", "", station)
    return name.removesuffix("역") if len(name) > 2 else name


def _particle(name: str | None, particle: str | None) -> str:
    """The particle in the form that follows ``name``: by its last sound."""
    if not particle or not name:
        return ""
    coda = (ord(name[-1]) - 0xAC00) % 28 if "가" <= name[-1] <= "힣" else 0
    return {"로": "으로" if coda not in (0, 8) else "로", "는": "은" if coda else "는"}[particle]


def _tidy(text: str, language: str) -> str:
    """Without the gaps that empty places of a template leave."""
    text = text.replace("역역", "역")
    text = re.sub(r"\s+([.,?:])", r"\1", re.sub(r"\s+", " ", text))
    text = re.sub(r"([?.])[.,]", r"\1", re.sub(r"[,:]+([.,?:])", r"\1", text)).strip(" ,:")
    return text[0].upper() + text[1:] if language == "en" else text


if __name__ == "__main__":
    main()
