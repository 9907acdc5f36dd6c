"""Requests as people really type them: synthetic, seeded perturbations of a task's examples.

Only the words of the user are changed, never the instructions of the system, the choices or the
answer. Which examples are changed where follows from the seed and the example's id alone.

- ``typos``: a word in ten is hit; a letter is replaced by its neighbour on the keyboard, doubled,
  left out or swapped with the next (Belinkov and Bisk 2018, "Synthetic and Natural Noise Both
  Break Neural Machine Translation"). In Korean the neighbours are those of the jamo on the
  standard two-set keyboard (KS X 5002).
- ``spacing`` (Korean): half of the spaces are left out, the most common mistake in Korean text.
- ``honorifics`` (Korean): the endings of formal and polite speech become those of plain speech.
- ``code-switching`` (Korean): words of the trades that have an everyday English form are written
  in English, as in "payment 취소해 주세요".
- ``casing`` (English): everything in lower case, or everything in upper case.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from seodang.artifact import sha256_bytes
from seodang.corpus.tasks import Example, Turn
from seodang.evaluation.tasks import Task

TYPO_SHARE = 0.1
SPACE_SHARE = 0.5

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEYS = {
    key: (row[max(0, i - 1) : i] + row[i + 1 : i + 2]) for row in _ROWS for i, key in enumerate(row)
}
# The two-set keyboard, key by key: initial consonants and vowels (the shifted ones left out).
_LATIN_OF = dict(
    zip("ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ", "".join(_ROWS), strict=True)
)
_JAMO_OF = {latin: jamo for jamo, latin in _LATIN_OF.items()}
_INITIAL = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
_VOWEL = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
_FINALS = 28

# Longest first. What stands before a polite ending stays: 있습니다 → 있어, 되나요 → 되나.
_PLAIN_SPEECH = (
    ("해 주시겠습니까", "해 줄래"),
    ("해주시겠습니까", "해줄래"),
    ("해 주십시오", "해 줘"),
    ("해주십시오", "해줘"),
    ("하시겠습니까", "할래"),
    ("주시겠어요", "줄래"),
    ("주십시오", "줘"),
    ("하십시오", "해"),
    ("부탁드립니다", "부탁해"),
    ("감사합니다", "고마워"),
    ("죄송합니다", "미안해"),
    ("싶습니다", "싶어"),
    ("했습니다", "했어"),
    ("됐습니다", "됐어"),
    ("되었습니다", "됐어"),
    ("었습니다", "었어"),
    ("았습니다", "았어"),
    ("였습니다", "였어"),
    ("겠습니다", "겠어"),
    ("있습니다", "있어"),
    ("없습니다", "없어"),
    ("습니다", "어"),
    ("습니까", "어"),
    ("합니다", "해"),
    ("합니까", "해"),
    ("됩니다", "돼"),
    ("됩니까", "돼"),
    ("입니다", "이야"),
    ("입니까", "이야"),
    ("인가요", "이야"),
    ("이에요", "이야"),
    ("예요", "야"),
    ("주세요", "줘"),
    ("하세요", "해"),
    ("까요", "까"),
    ("나요", "나"),
    ("네요", "네"),
    ("데요", "데"),
    ("해요", "해"),
    ("돼요", "돼"),
    ("어요", "어"),
    ("아요", "아"),
    ("려요", "려"),
    ("죠", "지"),
)
_POLITE = re.compile(rf"(?:{'|'.join(ending for ending, _ in _PLAIN_SPEECH)})(?=\W|$)")
_PLAIN = dict(_PLAIN_SPEECH)

_ENGLISH = {
    "결제": "payment",
    "환불": "refund",
    "주문": "order",
    "취소": "cancel",
    "배송": "delivery",
    "카드": "card",
    "계좌": "account",
    "계정": "account",
    "비밀번호": "password",
    "로그인": "login",
    "회원가입": "sign-up",
    "예약": "booking",
    "고객": "customer",
    "상담": "support",
    "오류": "error",
    "설정": "setting",
    "화면": "screen",
    "메뉴": "menu",
    "문서": "document",
    "파일": "file",
    "검색": "search",
    "기능": "function",
    "데이터": "data",
    "시스템": "system",
    "서비스": "service",
    "업데이트": "update",
    "요금": "price",
    "할인": "discount",
    "쿠폰": "coupon",
    "포인트": "point",
    "티켓": "ticket",
    "버스": "bus",
    "기차": "train",
    "열차": "train",
    "택시": "taxi",
    "공항": "airport",
    "호텔": "hotel",
    "기계": "machine",
    "부품": "part",
    "센서": "sensor",
    "모터": "motor",
    "밸브": "valve",
    "펌프": "pump",
    "안전": "safety",
    "사고": "accident",
    "점검": "check",
    "교체": "replace",
    "관리자": "manager",
    "담당자": "manager",
    "이메일": "email",
    "전화번호": "phone number",
    "주소": "address",
    "날짜": "date",
    "시간": "time",
    "연동": "integration",
    "정산": "settlement",
    "가맹점": "merchant",
    "채널": "channel",
    "테스트": "test",
}
_SWITCHABLE = re.compile("|".join(sorted(_ENGLISH, key=len, reverse=True)))

_Change = Callable[[str, np.random.Generator], str]


def perturbed(task: Task, perturbation: str, seed: int = 0, limit: int | None = None) -> Task:
    """The examples that a perturbation changes, changed; each ``id`` stays, ``synthetic`` is set.

    At most ``limit`` examples, evenly spread. Of a ranking task whole queries are taken, and the
    examples of a query that do not change stand as they are: without them there is no ranking.
    """
    change, language = PERTURBATIONS[perturbation]
    candidates = [example for example in task.examples if example.language == language]
    changed = [_changed(example, change, perturbation, seed) for example in candidates]
    differs = [new.messages != old.messages for new, old in zip(changed, candidates, strict=True)]
    if task.kind == "ranking":
        groups = {str(e.group): i for i, e in enumerate(candidates) if differs[i]}
        chosen = {list(groups)[i] for i in _spread(len(groups), limit)}
        kept = [e for e in changed if str(e.group) in chosen]
    else:
        found = [example for example, new in zip(changed, differs, strict=True) if new]
        kept = [found[i] for i in _spread(len(found), limit)]
    return replace(task, examples=kept)


def perturbations_of(task: Task) -> list[str]:
    """The perturbations of the languages that the task is in."""
    return [name for name, (_, language) in PERTURBATIONS.items() if language in task.languages]


def language_of(perturbation: str) -> str:
    """Which language a perturbation is of."""
    return PERTURBATIONS[perturbation][1]


def _spread(number: int, limit: int | None) -> list[int]:
    if limit is None or number <= limit:
        return list(range(number))
    return [int(i) for i in np.linspace(0, number - 1, limit)]


def _changed(example: Example, change: _Change, name: str, seed: int) -> Example:
    entropy = int(sha256_bytes(f"{seed}|{name}|{example.id}".encode())[:16], 16)
    rng = np.random.default_rng(entropy)
    messages = [
        message
        if message.role != "user"
        else Turn(role="user", content=change(message.content, rng) or message.content)
        for message in example.messages
    ]
    return example.model_copy(update={"messages": messages, "synthetic": True})


def typos(text: str, rng: np.random.Generator) -> str:
    """A letter of every tenth word or so is wrong, in Hangul or in Latin script."""

    def hit(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < 2 or rng.random() >= TYPO_SHARE:
            return word
        at = int(rng.integers(len(word)))
        kind = int(rng.integers(4))
        if kind == 0:
            return word[:at] + _neighbour(word[at], rng) + word[at + 1 :]
        if kind == 1:
            return word[:at] + word[at] + word[at:]
        if kind == 2:
            return word[:at] + word[at + 1 :]
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"[^\W\d_]+", hit, text)


def _neighbour(letter: str, rng: np.random.Generator) -> str:
    """What the finger beside the right one types; another letter of a script that is not known."""
    code = ord(letter) - ord("가")
    if 0 <= code < len(_INITIAL) * len(_VOWEL) * _FINALS:
        initial, rest = divmod(code, len(_VOWEL) * _FINALS)
        vowel, final = divmod(rest, _FINALS)
        if rng.random() < 0.5 and _VOWEL[vowel] in _LATIN_OF:
            vowel = _near(_VOWEL[vowel], _VOWEL, vowel, rng)
        elif _INITIAL[initial] in _LATIN_OF:
            initial = _near(_INITIAL[initial], _INITIAL, initial, rng)
        return chr(ord("가") + (initial * len(_VOWEL) + vowel) * _FINALS + final)
    near = _KEYS.get(letter.lower())
    if not near:
        return letter
    typed = near[int(rng.integers(len(near)))]
    return typed.upper() if letter.isupper() else typed


def _near(jamo: str, kind: str, own: int, rng: np.random.Generator) -> int:
    """The index in ``kind`` of a jamo on a neighbouring key; its own if none is of this kind."""
    near = [_JAMO_OF[key] for key in _KEYS[_LATIN_OF[jamo]]]
    near = [other for other in near if other in kind]
    return kind.index(near[int(rng.integers(len(near)))]) if near else own


def spacing(text: str, rng: np.random.Generator) -> str:
    """Half of the single spaces between words are left out."""
    return re.sub(r"(?<=\S) (?=\S)", lambda _: "" if rng.random() < SPACE_SHARE else " ", text)


def honorifics(text: str, rng: np.random.Generator) -> str:
    """Formal and polite endings as in speech among friends."""
    return _POLITE.sub(lambda match: _PLAIN[match[0]], text)


def code_switching(text: str, rng: np.random.Generator) -> str:
    """Words of the trades in English; particles stay attached to them."""
    return _SWITCHABLE.sub(lambda match: _ENGLISH[match[0]], text)


def casing(text: str, rng: np.random.Generator) -> str:
    """All in lower case or, one time in three, all in upper case."""
    return text.upper() if rng.random() < 1 / 3 else text.lower()


PERTURBATIONS: dict[str, tuple[_Change, str]] = {
    "typos-ko": (typos, "ko"),
    "spacing": (spacing, "ko"),
    "honorifics": (honorifics, "ko"),
    "code-switching": (code_switching, "ko"),
    "typos-en": (typos, "en"),
    "casing": (casing, "en"),
}
