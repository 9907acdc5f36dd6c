"""Perturbations: what changes, what never does, and that it is always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seodang.evaluation.perturb import (
    PERTURBATIONS,
    code_switching,
    honorifics,
    perturbations_of,
    perturbed,
    spacing,
    typos,
)
from seodang.evaluation.tasks import Task
from tiny_tasks import examples

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", list(PERTURBATIONS))
def test_only_the_users_words_change_and_always_alike(name: str) -> None:
    task = Task("routing", "choice", examples("choice", range(12)))
    found = perturbed(task, name)
    originals = {e.id: e for e in task.examples}
    assert found.examples
    for example in found.examples:
        before = originals[example.id]
        assert example.language == PERTURBATIONS[name][1]
        assert example.synthetic
        assert example.messages[0] == before.messages[0]
        assert example.messages[1] != before.messages[1]
        assert example.model_copy(update={"messages": before.messages}) == before
    assert perturbed(task, name) == found
    backwards = Task("routing", "choice", list(task.examples)[::-1])
    assert {e.id: e for e in perturbed(backwards, name).examples} == {
        e.id: e for e in found.examples
    }
    few = perturbed(task, name, limit=5).examples
    assert len(few) == 5
    assert {e.id for e in few} <= {e.id for e in found.examples}


def test_queries_stay_whole() -> None:
    task = Task("search", "ranking", examples("ranking", range(8)))
    found = perturbed(task, "typos-en", limit=2)
    groups = {e.group for e in found.examples}
    assert len(groups) == 2
    whole = [e.id for e in task.examples if e.group in groups]
    assert sorted(e.id for e in found.examples) == sorted(whole)


def test_a_task_is_perturbed_in_its_own_languages() -> None:
    korean = Task(
        "routing", "choice", [e for e in examples("choice", range(2)) if e.language == "ko"]
    )
    assert perturbations_of(korean) == ["typos-ko", "spacing", "honorifics", "code-switching"]
    assert perturbed(korean, "casing").examples == []


@pytest.mark.parametrize(
    ("polite", "plain"),
    [
        ("결제를 취소하고 싶습니다.", "결제를 취소하고 싶어."),
        ("카드를 정지해 주세요", "카드를 정지해 줘"),
        ("환불이 되나요? 언제 됩니까?", "환불이 되나? 언제 돼?"),
        ("오류가 있습니다만 괜찮아요", "오류가 있습니다만 괜찮아"),
        ("감사합니다!", "고마워!"),
    ],
)
def test_polite_endings_become_plain_ones(polite: str, plain: str) -> None:
    assert honorifics(polite, RNG) == plain


def test_words_of_the_trade_are_switched() -> None:
    assert (
        code_switching("결제 취소와 환불을 해 주세요", RNG) == "payment cancel와 refund을 해 주세요"
    )
    assert code_switching("비밀번호 오류", RNG) == "password error"


@given(st.text(max_size=200), st.integers(0, 2**31))
def test_spaces_are_only_left_out(text: str, seed: int) -> None:
    found = spacing(text, np.random.default_rng(seed))
    assert found.replace(" ", "") == text.replace(" ", "")
    assert len(found) <= len(text)


@given(
    st.text(st.sampled_from("결제를 취소해 주세요 the card 12 뷁ㅋ\n"), max_size=120),
    st.integers(0, 2**31),
)
def test_typos_hit_letters_only(text: str, seed: int) -> None:
    found = typos(text, np.random.default_rng(seed))
    keep = "12 \n"
    assert [c for c in found if c in keep] == [c for c in text if c in keep]
    assert abs(len(found) - len(text)) <= len(text.split())


def test_typos_are_on_neighbouring_keys() -> None:
    text = " ".join(["하"] * 0 + ["가나"] * 400)
    seen = set(typos(text, np.random.default_rng(1)).split())
    assert "가나" in seen
    # ㄱ stands between ㄷ and ㅅ, ㅏ between ㅓ and ㅣ; ㄴ between ㅁ and ㅇ.
    assert {"다나", "사나", "거나", "기나", "가마", "가아"} & seen
    assert seen <= {
        *("가나", "다나", "사나", "거나", "기나", "가마", "가아", "가너", "가니"),
        *("가가나", "가나나", "나", "가", "나가"),
    }
