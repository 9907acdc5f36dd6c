"""Sums and legs: two of reasoning-gym's arithmetic generators, worded in Korean and English.

The numbers and the verifier are the library's; the words are ours, and so are the thoughts, which
a program writes: column by column with carries and borrows, as at school. All of it is synthetic.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

from seodang.foundation.post_training.problem import Task, Worded
from seodang.recipe import Language

CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
LEG_COUNTING = {"min_animals": 2, "max_animals": 2, "max_instances": 9}

_PLACES = {
    "ko": ("일", "십", "백", "천"),
    "en": ("ones", "tens", "hundreds", "thousands"),
}
_SUM = {
    "ko": ("{} = 얼마인가?", "계산하라: {}"),
    "en": ("What is {}?", "Calculate {}."),
}
_LEGS = {
    "ko": ("{}의 다리는 모두 몇 개인가?", "다리를 모두 세어라: {}"),
    "en": ("How many legs do {} have in total?", "Count all legs: {}."),
}

ANIMALS = {
    "snake": ("뱀", 0), "sea slug": ("갯민숭달팽이", 0), "jellyfish": ("해파리", 0),
    "flatworm": ("납작벌레", 0), "leech": ("거머리", 0), "chicken": ("닭", 2), "bird": ("새", 2),
    "human": ("사람", 2), "duck": ("오리", 2), "dog": ("개", 4), "cat": ("고양이", 4),
    "cow": ("소", 4), "horse": ("말", 4), "lion": ("사자", 4), "elephant": ("코끼리", 4),
    "giraffe": ("기린", 4), "tiger": ("호랑이", 4), "deer": ("사슴", 4), "sheep": ("양", 4),
    "starfish": ("불가사리", 5), "insect": ("곤충", 6), "ant": ("개미", 6),
    "butterfly": ("나비", 6), "beetle": ("딱정벌레", 6), "bee": ("꿀벌", 6), "wasp": ("말벌", 6),
    "grasshopper": ("메뚜기", 6), "cricket": ("귀뚜라미", 6), "cockroach": ("바퀴벌레", 6),
    "praying mantis": ("사마귀", 6), "firefly": ("반딧불이", 6), "spider": ("거미", 8),
    "scorpion": ("전갈", 8), "crab": ("게", 10), "lobster": ("바닷가재", 10),
    "shrimp": ("새우", 10), "woodlouse": ("쥐며느리", 14),
}  # fmt: skip


def word_sum(entry: dict[str, Any], language: Language, variant: int) -> Worded:
    """A chain sum such as ``84 + 37``."""
    expression = str(entry["metadata"]["expression"])
    first, *rest = re.findall(r"-?\d+|(?<= )[+-](?= )", expression)
    value, thoughts = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        value, lines = step_by_step(value, operator, int(term), _PLACES[language])
        thoughts += lines
    return Worded(_SUM[language][variant].format(expression), "\n".join(thoughts), str(value))


def step_by_step(
    value: int, operator: str, term: int, places: tuple[str, ...]
) -> tuple[int, list[str]]:
    """``value ± term`` by columns: the result, and the lines on the way to it.

    Of numbers below zero the magnitudes are added or subtracted: ``12 - 37 = -(37 - 12)``.
    """
    result = value + term if operator == "+" else value - term
    adds = (value >= 0) == (operator == "+")
    large, small = sorted((abs(value), term), reverse=True)
    shown = f"{abs(value)} + {term}" if adds else f"{large} - {small}"
    head = f"{value} {operator} {term}"
    if result < 0:
        head += f" = -({shown})"
    elif shown != head:
        head += f" = {shown}"
    columns = _add(abs(value), term, places) if adds else _subtract(large, small, places)
    return result, [head, *columns, f"= {result}"]


def _add(left: int, right: int, places: tuple[str, ...]) -> list[str]:
    lines, carry, written = [], 0, ""
    for place, x, y in _columns(left, right, places):
        total = x + y + carry
        digits = f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}"
        carry, written = total // 10, f"{total % 10}{written}"
        lines.append(f"{place} {digits} > {written}")
    if carry:
        lines.append(f"{places[len(lines)]} 1 > 1{written}")
    return lines


def _subtract(left: int, right: int, places: tuple[str, ...]) -> list[str]:
    lines, borrow, written = [], 0, ""
    for place, x, y in _columns(left, right, places):
        digits = f"{x}-{y}-1" if borrow else f"{x}-{y}"
        rest = x - y - borrow
        borrow = int(rest < 0)
        rest += 10 * borrow
        written = f"{rest}{written}"
        lines.append(f"{place} {digits}{'+10' if borrow else ''}={rest} > {written}")
    return lines


def _columns(left: int, right: int, places: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Place and digits, from the right; the shorter number has zeros before it."""
    width = max(len(str(left)), len(str(right)))
    a, b = (str(n).zfill(width)[::-1] for n in (left, right))
    return [(place, int(x), int(y)) for place, x, y in zip(places, a, b, strict=False)]


def word_legs(entry: dict[str, Any], language: Language, variant: int) -> Worded:
    """Legs of some animals: ``3 cows, 2 ants``."""
    animals: dict[str, int] = entry["metadata"]["animals"]
    named = {animal: _count(animal, number, language) for animal, number in animals.items()}
    products = [number * ANIMALS[animal][1] for animal, number in animals.items()]
    thoughts = [
        f"{number}*{ANIMALS[animal][1]}={product}"
        for (animal, number), product in zip(animals.items(), products, strict=True)
    ]
    sums = pairwise(accumulate(products))
    thoughts += [f"{a}+{b - a}={b}" for a, b in sums]
    question = _LEGS[language][variant].format(", ".join(named.values()))
    return Worded(question, "\n".join(thoughts), str(sum(products)))


def _count(animal: str, number: int, language: Language) -> str:
    if language == "ko":
        return f"{ANIMALS[animal][0]} {number}{'명' if animal == 'human' else '마리'}"
    return f"{number} {animal}" if number == 1 else f"{number} {_PLURALS.get(animal, animal + 's')}"


_PLURALS = {
    "jellyfish": "jellyfish", "leech": "leeches", "deer": "deer", "sheep": "sheep",
    "starfish": "starfish", "butterfly": "butterflies", "cockroach": "cockroaches",
    "praying mantis": "praying mantises", "firefly": "fireflies", "shrimp": "shrimp",
    "woodlouse": "woodlice",
}  # fmt: skip


TASKS = {
    "chain_sum": Task("chain_sum", CHAIN_SUM, word_sum),
    "leg_counting": Task("leg_counting", LEG_COUNTING, word_legs),
}
