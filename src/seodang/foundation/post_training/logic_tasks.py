"""Siblings and knights: two of reasoning-gym's logic generators, worded in Korean and English.

The puzzles and the verifier are the library's; the words and the thoughts are ours, and synthetic.
"Alice in Wonderland" asks what most people see at once and language models long did not (Nezhurina
et al., arXiv 2406.02061); knights tell the truth and knaves lie (Xie et al., arXiv 2410.23123).
Its syllogisms are left out: reasoning-gym 0.1.25 takes an undistributed middle term for valid.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from seodang.foundation.post_training.problem import Task, Worded
from seodang.recipe import Language

AIW = {"task_type_weights": [0.5, 0.5, 0.0], "max_entities": 9}  # siblings, friends, no colleagues
KNIGHTS_KNAVES = {"n_people": 2, "depth_constraint": 2, "width_constraint": 2}

_KOREAN_NAMES = {
    "Mary": "메리", "Patricia": "퍼트리샤", "Jennifer": "제니퍼", "Linda": "린다",
    "Elizabeth": "엘리자베스", "Barbara": "바버라", "Susan": "수전", "Jessica": "제시카",
    "Sarah": "세라", "Margaret": "마거릿", "Alice": "앨리스",
}  # fmt: skip
_AIW = {
    ("siblings", "ko"): (
        "{name}에게 남자 형제가 {men}명, 여자 형제가 {women}명 있다. "
        "{name}의 남자 형제에게는 여자 형제가 몇 명 있는가?",
        "여자인 {name}에게 여자 형제 {women}명과 남자 형제 {men}명이 있다. "
        "그 남자 형제의 여자 형제는 몇 명인가?",
    ),
    ("siblings", "en"): (
        "{name} has {men} brothers and {women} sisters. How many sisters does her brother have?",
        "{name} is a girl with {women} sisters and {men} brothers. "
        "How many sisters has each brother?",
    ),
    ("friends", "ko"): (
        "여학생 {name}에게 남학생 친구 {men}명과 여학생 친구 {women}명이 있고 모두 서로 친구다. "
        "그 남학생에게는 여학생 친구가 몇 명 있는가?",
        "여학생 {name}의 친구는 여학생 {women}명과 남학생 {men}명이고 모두 서로 친구다. "
        "남학생 한 명의 여학생 친구는 몇 명인가?",
    ),
    ("friends", "en"): (
        "The girl {name} has {men} boys and {women} girls as friends, and all are friends with "
        "each other. How many girls are friends of one of the boys?",
        "{women} girls and {men} boys are friends of the girl {name} and of each other. "
        "How many girls has a boy as friends?",
    ),
}
_AIW_THOUGHTS = {
    ("siblings", "ko"): "여자 형제 {women}명과 자신: {women}+1={answer}",
    ("siblings", "en"): "the {women} sisters and herself: {women}+1={answer}",
    ("friends", "ko"): "여학생 친구 {women}명과 자신: {women}+1={answer}",
    ("friends", "en"): "the {women} girls and herself: {women}+1={answer}",
}

_ISLAND = {
    "ko": (
        '기사는 참말만, 건달은 거짓말만 한다. {0}: "{2}" {1}: "{3}" 두 사람은 각각 누구인가?',
        '{0}의 말: "{2}" {1}의 말: "{3}" 기사는 늘 참말을, 건달은 늘 거짓말을 한다. '
        "누가 기사이고 누가 건달인가?",
    ),
    "en": (
        "Knights always tell the truth, knaves always lie. "
        '{0} says: "{2}" {1} says: "{3}" Who is what?',
        '{0}: "{2}" {1}: "{3}" Knights never lie, and knaves always do. Who is a knight and who '
        "is a knave?",
    ),
}
_ROLES = {"ko": ("기사", "건달"), "en": ("knight", "knave")}
_IS = {"ko": "{0}은 {1}", "en": "{0} is a {1}"}
_TRUTH = {"ko": ("거짓", "참"), "en": ("false", "true")}
_FITS = {"ko": ("아니다", "맞다"), "en": ("no", "yes")}
_SAID = {
    ("and", "ko"): "{0}은 {1}이고 {2}은 {3}이다.",
    ("and", "en"): "{0} is a {1} and {2} is a {3}.",
    ("or", "ko"): "{0}은 {1}이거나 {2}은 {3}이다.",
    ("or", "en"): "{0} is a {1} or {2} is a {3}.",
    ("->", "ko"): "{0}이 {1}이면 {2}은 {3}이다.",
    ("->", "en"): "If {0} is a {1} then {2} is a {3}.",
    ("<=>", "ko"): "{0}이 {1}일 필요충분조건은 {2}이 {3}인 것이다.",
    ("<=>", "en"): "{0} is a {1} if and only if {2} is a {3}.",
}


def word_siblings(entry: dict[str, Any], language: Language, variant: int) -> Worded:
    """Sisters of a brother, or girls that a boy is friends with."""
    question, kind = str(entry["question"]), str(entry["metadata"]["task_type"])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", question)}
    name = question.split(maxsplit=1)[0]
    facts: dict[str, Any] = {
        "name": _KOREAN_NAMES[name] if language == "ko" else name,
        "men": counts["brothers"] if kind == "siblings" else counts["male"],
        "women": counts["sisters"] if kind == "siblings" else counts["female"],
        "answer": entry["answer"],
    }
    asked = _AIW[kind, language][variant].format(**facts)
    if language == "en":
        asked = _singular(asked)
    return Worded(asked, _AIW_THOUGHTS[kind, language].format(**facts), str(entry["answer"]))


def _singular(text: str) -> str:
    return re.sub(r"\b1 (brother|sister|girl|boy)s\b", r"1 \1", text)


def word_knights(entry: dict[str, Any], language: Language, variant: int) -> Worded:
    """Who of two people is a knight, who a knave; every case is tried in turn."""
    names = people(entry, language)
    statements = entry["metadata"]["statements"]
    spoken = [_say(statement, names, language) for statement in statements]
    lines = []
    for case in product((True, False), repeat=len(names)):
        values = [holds(statement, case) for statement in statements]
        fits = values == list(case)
        roles = " ".join(_ROLES[language][not knight] for knight in case)
        truth = " ".join(_TRUTH[language][value] for value in values)
        lines.append(f"{roles}: {truth} {_FITS[language][fits]}")
        if fits:
            break
    answer = ", ".join(
        _IS[language].format(name, _ROLES[language][not knight])
        for name, knight in zip(names, case, strict=True)
    )
    return Worded(_ISLAND[language][variant].format(*names, *spoken), "\n".join(lines), answer)


def people(entry: dict[str, Any], language: Language) -> list[str]:
    """The names of the two; in Korean 갑 and 을, as such puzzles have them."""
    return ["갑", "을"] if language == "ko" else [str(name) for name in entry["metadata"]["names"]]


def holds(statement: Any, knights: tuple[bool, ...]) -> bool:
    """Whether a statement of reasoning-gym is true if these are the knights."""
    operator, *parts = statement
    if operator in ("telling-truth", "lying"):
        return bool(knights[parts[0]] == (operator == "telling-truth"))
    values = [holds(part, knights) for part in parts]
    match operator:
        case "not":
            return not values[0]
        case "and":
            return all(values)
        case "or":
            return any(values)
        case "->":
            return not values[0] or values[1]
        case "<=>":
            return bool(values[0] == values[1])
    raise ValueError(f"unknown operator {operator!r} in a statement")


def _say(statement: Any, names: list[str], language: Language) -> str:
    operator, *parts = statement
    if operator in ("and", "or", "->", "<=>"):
        words = [word for part in parts for word in _claim(part, names, language)]
        return _SAID[operator, language].format(*words)
    simple = _IS[language].format(*_claim(statement, names, language))
    return f"{simple}이다." if language == "ko" else f"{simple}."


def _claim(statement: Any, names: list[str], language: Language) -> tuple[str, str]:
    """Name and role of a claim about one person, ``not`` taken in."""
    operator, inner = statement
    negated = operator == "not"
    operator, person = inner if negated else statement
    return names[person], _ROLES[language][(operator == "lying") != negated]


def read_knights(answer: str, entry: dict[str, Any], language: Language) -> str:
    """The answer in the words that the generator chose for its knights and knaves."""
    metadata = entry["metadata"]
    terms = metadata["knight_knave_terms"]
    theirs = dict(zip(_ROLES[language], (terms["knight"], terms["knave"]), strict=True))
    said = []
    for ours, name in zip(people(entry, language), metadata["names"], strict=True):
        pattern = _IS[language].format(re.escape(ours), f"({'|'.join(theirs)})")
        found = re.findall(rf"{pattern}(?!\w)", answer)
        said += [f"{name} is a {theirs[role]}" for role in found]
    return ", ".join(said)


TASKS = {
    "aiw": Task("aiw", AIW, word_siblings),
    "knights_knaves": Task("knights_knaves", KNIGHTS_KNAVES, word_knights, read_knights),
}
