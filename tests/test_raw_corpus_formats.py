"""Raw text of every kind of file, and the encodings that Korean files are written in."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seodang.corpus.raw.encodings import decode
from seodang.corpus.raw.formats import is_known, kind_of, read_texts
from seodang.corpus.raw.sources import pieces, tidy
from seodang.errors import InputError

KOREAN = (
    "서당에서는 아이들이 한문과 예절을 배웠습니다. 훈장은 한 사람이었고 제자는 여럿이었습니다.\n"
    "낡은 문서가 옛 부호화 방식으로 남아 있어도 내용은 그대로 읽을 수 있어야 합니다.\n"
)


def texts(name: str, content: str | bytes) -> list[str]:
    data = content.encode() if isinstance(content, str) else content
    return [text for _, text in read_texts(data, name, name, None)[1]]


@pytest.mark.parametrize("encoding", ["euc-kr", "cp949", "utf-8", "utf-8-sig", "utf-16"])
def test_korean_is_read_in_every_encoding_it_is_written_in(encoding: str) -> None:
    assert decode(KOREAN.encode(encoding), "a.txt").text == KOREAN


def test_euc_kr_is_read_as_cp949_which_contains_it() -> None:
    beyond = KOREAN + "뷁 똠방각하 펲시콜라 찦차를 타고 온 펲시맨\n" * 3  # not in EUC-KR
    with pytest.raises(UnicodeDecodeError):
        beyond.encode("cp949").decode("euc-kr")
    decoded = decode(beyond.encode("cp949"), "a.txt")
    assert decoded.text == beyond
    assert decoded.encoding == "cp949"
    assert decode(KOREAN.encode("euc-kr"), "a.txt").encoding == "cp949"


def test_western_text_in_cp1252_is_not_taken_for_korean() -> None:
    text = "Le garçon mangea des crêpes à l’hôtel où son père était déjà arrivé. " * 5
    assert decode(text.encode("cp1252"), "a.txt").text == text


@pytest.mark.parametrize("encoding", ["euc-kr", "cp949"])
@pytest.mark.parametrize(
    "text",
    ["## 자주 묻는 질문\n", "- 사용가능한 API\n", "\n좋은 결론 예시:\n", "0.1씩 감소\n"],
)
def test_short_korean_is_read_whatever_markup_it_stands_in(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding), "a.txt").text == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb2312", "中华人民共和国是一个社会主义国家，首都北京。"),
        ("big5", "這是一個用繁體中文寫成的句子，用來測試。"),
        ("euc_jp", "日本語の文章です。これはテストです。"),
        ("shift_jis", "日本語の文章です。これはテストです。"),
    ],
)
def test_other_languages_are_not_taken_for_korean(encoding: str, text: str) -> None:
    try:
        decoded = decode(text.encode(encoding) * 5, "a.txt")
    except InputError:
        return
    assert decoded.encoding != "cp949"


def test_a_file_that_mixes_encodings_is_refused_with_line_and_byte() -> None:
    mixed = KOREAN.encode() + "셋째 줄은 다릅니다\n".encode("cp949") + KOREAN.encode()
    at = len(KOREAN.encode())
    with pytest.raises(
        InputError, match=rf"a\.txt:3: byte 0xbc at offset {at} is not UTF-8, as other lines are"
    ):
        decode(mixed, "a.txt")


def test_bytes_in_no_encoding_are_refused_with_the_byte() -> None:
    noise = bytes([0x41, 0x0A, 0xFF, 0xFE, 0x00, 0x81, 0x8D, 0x8F, 0x90, 0x9D]) * 40
    with pytest.raises(InputError, match=r"a\.txt:2: byte 0xff at offset 2 is in no encoding"):
        decode(noise, "a.txt")


def test_a_named_encoding_is_taken_at_its_word() -> None:
    assert decode("é".encode("latin-1"), "a.txt", "latin-1").text == "é"
    with pytest.raises(InputError, match=r"a\.txt:1: byte 0x\w+ at offset 0 is not euc-kr"):
        decode("뷁".encode("cp949"), "a.txt", "euc-kr")
    with pytest.raises(InputError, match="no encoding 'klingon'"):
        decode(b"a", "a.txt", "klingon")


@given(st.text(alphabet=st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1))
def test_utf8_is_never_taken_for_anything_else(text: str) -> None:
    decoded = decode(text.encode(), "a.txt")
    assert (decoded.text, decoded.encoding) == (text, "utf-8")


def test_markdown_loses_front_matter_comments_and_lines_of_tags_only() -> None:
    page = (
        "---\ntitle: 결제\n---\n# 결제\n"
        '<div class="a">\n<!-- 숨은\n글 -->\n본문 <b>굵게</b>\n</div>\n'
    )
    assert texts("a.md", page) == ["# 결제\n\n본문 <b>굵게</b>\n"]


def test_html_is_its_text_without_scripts() -> None:
    page = "<html><body><script>x()</script><p>첫 문단</p><p>둘째</p></body></html>"
    assert texts("a.html", page) == ["첫 문단\n둘째"]


def test_json_is_its_sentences_in_order_without_names_and_repeats() -> None:
    value = {
        "id": "abc",
        "말": ["한 문장", "한 문장"],
        "b": {"c": "<p>둘째 <b>문장</b></p>", "n": 3},
    }
    assert texts("a.json", json.dumps(value)) == ["한 문장\n둘째 문장"]
    records = [{"a": "첫 글"}, {"a": "둘째 글"}]
    assert texts("a.json", json.dumps(records)) == ["첫 글", "둘째 글"]
    lines = "\n".join(json.dumps(record) for record in records)
    assert texts("a.jsonl", lines) == ["첫 글", "둘째 글"]


def test_tables_give_a_text_per_row() -> None:
    assert texts("a.csv", 'id,설명\n1,"긴 설명, 쉼표"\n2,또 다른 설명\n') == [
        "긴 설명, 쉼표",
        "또 다른 설명",
    ]
    assert texts("a.tsv", "id\t설명\n1\t긴 설명\n") == ["긴 설명"]


PO = """msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save file"
msgstr "파일 저장"

#, fuzzy
msgid "Open file"
msgstr "틀린 번역"

msgid "one"
msgid_plural "many"
msgstr[0] "파일 %d개"

#~ msgid "gone"
#~ msgstr "지난 번역"
"""


def compiled(pairs: dict[str, str]) -> bytes:
    """A .mo file as msgfmt writes it (GNU gettext manual, "The Format of GNU MO Files")."""
    keys = sorted(pairs)
    count, table = len(keys), 28
    blobs, offset = b"", table + 16 * count
    tables: list[bytes] = []
    for strings in (keys, [pairs[key] for key in keys]):
        for text in strings:
            data = text.encode()
            tables.append(struct.pack("<II", len(data), offset + len(blobs)))
            blobs += data + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, table, table + 8 * count, 0, 0)
    return head + b"".join(tables) + blobs


def test_translations_are_read_from_source_and_compiled_catalogues() -> None:
    assert texts("ko.po", PO) == ["파일 저장\n파일 %d개"]
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    assert texts("ko.mo", compiled({**header, "Save": "파일 저장"})) == ["파일 저장"]


def test_fluent_and_mallard() -> None:
    assert texts("a.ftl", "key = 새 창 열기\n    .label = 창 { $n }개 닫기\n") == [
        "새 창 열기\n개 닫기"
    ]
    body = "<title>소개</title><p>첫 <em>글</em></p>"
    page = f'<page xmlns="http://projectmallard.org/1.0/">{body}</page>'
    assert texts("a.page", page) == ["소개\n첫 글"]


def test_source_code_is_read_as_it_is() -> None:
    assert texts("a.py", "def f():\n    return 1\n") == ["def f():\n    return 1\n"]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_read(suffix: str, pack: object) -> None:
    assert callable(pack)
    assert kind_of("b.TXT" + suffix) == ".txt"
    assert texts("b.txt" + suffix, pack(KOREAN.encode())) == [KOREAN]
    with pytest.raises(InputError, match="cannot be decompressed"):
        texts("b.txt" + suffix, b"not compressed")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"x", "unknown extension '.docx'"),
        ("a.json", b"{", "not valid JSON"),
        ("a.jsonl", b'{"a": "b c"}\n{', "a.jsonl:2: not valid JSON"),
        ("a.po", b'msgid "a"\nbogus\n', "not a valid .po file"),
        ("a.mo", b"x" * 40, "not a valid .mo file"),
        ("a.page", b"<page><p></page>", "not a valid Mallard page"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts(name, content)


def test_known_extensions() -> None:
    assert is_known("x/y.md")
    assert is_known("x.rs")
    assert is_known("x.mo")
    assert not is_known("x.png")
    assert not is_known("Makefile")


def test_tidy_text_has_one_form() -> None:
    decomposed = "\u1109\u1165\u1103\u1161\u11bc"
    assert tidy(decomposed + "\x00\x07\r\n끝  \n\n") == "서당\n끝"


@given(st.lists(st.text(alphabet="가나 a", max_size=40), max_size=60), st.integers(10, 200))
def test_pieces_hold_every_line_once_and_end_where_lines_do(lines: list[str], size: int) -> None:
    text = "\n".join(lines).strip("\n")
    found = list(pieces(text, size))
    whole = [line for line in text.split("\n") if line.strip()]
    assert [line for piece in found for line in piece.split("\n") if line.strip()] == whole
    longest = max((len(line.encode()) for line in lines), default=0)
    assert all(len(piece.encode()) <= 2 * size + longest + 1 for piece in found)
