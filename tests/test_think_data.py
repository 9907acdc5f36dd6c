"""Generated problems: in two languages, thought through by program, judged by reasoning-gym."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.arithmetic import leg_counting
from reasoning_gym.logic.knights_knaves import KnightsKnavesDataset

from seodang.foundation.post_training.arithmetic_tasks import ANIMALS, step_by_step
from seodang.foundation.post_training.logic_tasks import holds
from seodang.foundation.post_training.reasoning_data import (
    TASKS,
    Problem,
    build_reasoning_data,
    make_problem,
    make_problems,
    read_problems,
)
from seodang.foundation.post_training.rewards import Reward, reward
from tiny_think import TINY

PLACES = ("ones", "tens", "hundreds", "thousands")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return make_problems(range(800), seed=3)


def test_tasks_and_languages_take_turns(problems: list[Problem]) -> None:
    kinds = [(make_problem(n, 3).task, make_problem(n, 3).language) for n in range(8)]
    assert sorted(kinds) == sorted(product(TASKS, ("ko", "en")))
    assert len({problem.question for problem in problems}) == len(problems) > 600


def test_the_verifier_agrees_with_our_answers_and_with_no_other(problems: list[Problem]) -> None:
    for problem in problems:
        assert problem.is_right(problem.answer)
        assert not problem.is_right("")
    by_kind: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault((problem.task, problem.language), []).append(problem)
    assert len(by_kind) == 2 * len(TASKS)
    for same in by_kind.values():
        answers = {problem.answer for problem in same}
        for problem in same[:5]:
            right = {answer for answer in answers if problem.is_right(answer)}
            assert right == {problem.answer} & answers


def test_korean_is_korean(problems: list[Problem]) -> None:
    for problem in problems:
        hangul = re.search("[가-힣]", problem.question + problem.thoughts)
        latin = re.search("[A-Za-z]", problem.question + problem.thoughts + problem.answer)
        assert (hangul is None) == (problem.language == "en")
        assert (latin is None) == (problem.language == "ko")


def test_equal_numbers_and_seeds_give_equal_problems(problems: list[Problem]) -> None:
    assert make_problems(range(40), seed=3) == problems[:40]
    assert make_problem(8, 3) != make_problem(8, 4)


@given(st.integers(-999, 999), st.sampled_from("+-"), st.integers(0, 999))
def test_columns_are_sums(value: int, operator: str, term: int) -> None:
    result, lines = step_by_step(value, operator, term, PLACES)
    assert result == (value + term if operator == "+" else value - term)
    head, *columns, last = lines
    assert last == f"= {result}"
    assert int(columns[-1].rpartition("> ")[2]) == abs(result)
    for side in head.split(" = "):
        assert eval(side) == result
    for line in columns:
        if "=" in line:
            left, right = line.split(" ")[1].split("=")
            assert eval(left) == int(right)


def test_legs_are_the_generators() -> None:
    assert {animal: legs for animal, (_, legs) in ANIMALS.items()} == leg_counting.ANIMALS
    assert len({korean for korean, _ in ANIMALS.values()}) == len(ANIMALS)


def test_statements_hold_when_the_generator_says_so() -> None:
    generator = reasoning_gym.create_dataset(
        "knights_knaves", **TASKS["knights_knaves"].parameters, seed=1, size=200
    )
    for entry in generator:
        for statement in entry["metadata"]["statements"]:
            for case in product((True, False), repeat=2):
                expected = KnightsKnavesDataset.test_satisfiability(statement, case)
                assert holds(statement, case) == expected


def test_parts_share_no_question(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"problems": 300, "overlap_problems": 100, "held_out": 60})
    data = build_reasoning_data(config, tmp_path / "data")
    parts = [read_problems(data, split) for split in ("train", "overlap", "held-out")]
    assert [len(part) for part in parts] == [300, 100, 60]
    assert len({problem.question for part in parts for problem in part}) == 460
    assert data.manifest.summary["synthetic"] is True
    assert "synthetic" in data.manifest.sources[0].name
    again = build_reasoning_data(config, tmp_path / "again")
    assert again.digest == data.digest


def judged(said: str, mode: str, *, ended: bool = True) -> tuple[int, int]:
    problem = Problem("chain_sum", "ko", "1 + 1?", "1 + 1", "2", {"answer": "2", "metadata": {}})
    found: Reward = reward(problem, mode, said, ended)  # type: ignore[arg-type]
    return found.correct, found.format


@pytest.mark.parametrize(
    ("said", "mode", "expected"),
    [
        ("1 + 1</think>2", "think", (1, 0)),
        ("</think>2", "think", (1, 0)),
        ("1 + 1</think>3", "think", (-1, 0)),
        ("2", "think", (1, -1)),
        ("a</think>b</think>2", "think", (1, -1)),
        ("<think>a</think>2", "think", (1, -1)),
        ("1 + 1</think>", "think", (-1, -1)),
        ("2", "instant", (1, 0)),
        (" 2\n", "instant", (1, 0)),
        ("3", "instant", (-1, 0)),
        ("", "instant", (-1, -1)),
        ("1 + 1</think>2", "instant", (1, -1)),
        ("<think>2", "instant", (-1, -1)),
    ],
)
def test_reward(said: str, mode: str, expected: tuple[int, int]) -> None:
    assert judged(said, mode) == expected
    assert judged(said, mode, ended=False) == (expected[0], -1)
