"""A raw corpus of a few synthetic documents: the artifact's real format, without the work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from seodang.artifact import Artifact, Draft, Source, begin

# Synthetic: written for these tests.
KOREAN = [
    "서당에서는 훈장 한 분이 여러 아이를 가르쳤습니다.",
    "결제를 취소하려면 고객센터에 문의하거나 주문 내역에서 취소 단추를 누르십시오.",
    "기차는 서울역에서 오전 9시 15분에 출발하여 부산역에 12시 3분에 도착합니다.",
    "공장의 온도가 37도를 넘으면 경보가 울리고 담당자에게 알림을 보냅니다.",
    "설정에서 언어를 한국어로 바꾸면 화면의 모든 글자가 한국어로 나옵니다.",
]
ENGLISH = [
    "The school had one teacher and many pupils, who read aloud all day.",
    "To cancel a payment, call the service desk or open the order and press cancel.",
    "The train leaves Seoul at 9:15 and arrives in Busan at 12:03.",
    "When the machine is hotter than 37 degrees, an alarm rings and the operator is told.",
    "Choose Korean in the settings, and every label on the screen will be Korean.",
]
CODE = [
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "for index in range(10):\n    print(index, index * index)\n",
    "class Train:\n    def __init__(self, name: str) -> None:\n        self.name = name\n",
    "if (count > 37) {\n  alarm.ring();\n}\n",
    "const total = items.reduce((sum, item) => sum + item.price, 0);\n",
]
LANGUAGES = {"ko": KOREAN, "en": ENGLISH, "code": CODE}


def tiny_documents(repeats: int = 40) -> list[tuple[str, str]]:
    """Pairs of language and text, ``repeats`` for each sentence, all of them different."""
    return [
        (language, f"{line} {number}: {lines[number % len(lines)]}")
        for language, lines in LANGUAGES.items()
        for number in range(repeats)
        for line in lines
    ]


def tiny_raw(path: Path, documents: Iterable[tuple[str, str]] | None = None) -> Artifact:
    """Write a finished raw corpus; every tenth document is held out."""
    draft = begin(path, "raw-corpus", {"synthetic": True}, {})
    assert isinstance(draft, Draft)
    sides: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    for number, (language, text) in enumerate(tiny_documents() if documents is None else documents):
        row = {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "text": text}
        row |= {"source": "tests", "license": "Apache-2.0", "language": language, "origin": "tests"}
        sides["train" if number % 10 else "held-out"].append(row)
    for side, rows in sides.items():
        (path / side).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), path / side / "00000.parquet")
    return draft.finish(sources=[Source(name="tests", license="Apache-2.0")])
