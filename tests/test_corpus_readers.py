"""Every format and every kind of bad input, through the public readers."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest

from seodang.corpus.documents import Document, normalise
from seodang.corpus.readers import read_jsonl, read_source, source_digest
from seodang.errors import InputError
from seodang.recipe import Message, SourceConfig

LIMIT = 1000


def local(path: Path, **keys: object) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "license": "MIT", "path": str(path), **keys})


def read(path: Path, **keys: object) -> list[Document]:
    return list(read_source(local(path, **keys), LIMIT))


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_jsonl_holds_texts_and_conversations(tmp_path: Path) -> None:
    lines = [{"text": "안녕\r\nthere  \n\n"}, {"messages": CHAT, "more": 1}]
    content = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n"
    for name in ("a.jsonl", "a.jsonl.gz", "A.JSONL"):
        text, chat = read(write(tmp_path / name, content))
        assert (text.text, text.messages, text.origin) == ("안녕\nthere", None, f"{name}#1")
        assert (chat.messages, chat.origin, chat.license) == (CHAT, f"{name}#3", "MIT")


def test_json_and_yaml_lists_at_a_dotted_path(tmp_path: Path) -> None:
    records = [{"title": "Fees", "n": 3, "flag": None}, {"title": "Cards", "n": 4}]
    nested = json.dumps({"meta": 1, "data": {"docs": records}})
    for name in ("a.json", "a.json.gz", "a.yaml", "a.yml"):
        file = write(tmp_path / name, nested)  # JSON is YAML too
        documents = read(file, records="data.docs", text="{title} ({n}) {{x}}")
        assert [d.text for d in documents] == ["Fees (3) {x}", "Cards (4) {x}"]
        assert [d.origin for d in documents] == [f"{name}#0", f"{name}#1"]
    template = [Message(role="user", content="{title}?"), Message(role="assistant", content="{n}")]
    (first, _) = read(tmp_path / "a.json", records="data.docs", messages=template)
    assert first.messages == [
        {"role": "user", "content": "Fees?"},
        {"role": "assistant", "content": "3"},
    ]


def test_turns_alternate_between_user_and_assistant(tmp_path: Path) -> None:
    file = write(tmp_path / "talk.yml", "conversations:\n- - Hi\n  - Hello\n  - Bye\n")
    (document,) = read(file, records="conversations", turns=True)
    assert document.messages == [*CHAT, {"role": "user", "content": "Bye"}]


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    for name in ("help.md", "help.txt", "help.txt.gz"):
        (document,) = read(write(tmp_path / name, "# Title\r\n\r\nText \r\n"))
        assert (document.text, document.origin) == ("# Title\n\nText", name)
    (document,) = read(tmp_path / "help.md", text="{name}: {text}")
    assert document.text == "help: # Title\n\nText"


def test_html_keeps_the_text_of_blocks_and_drops_the_rest(tmp_path: Path) -> None:
    page = """<html><head><title>no</title><style>no{}</style></head><body><nav>no</nav>
      <main><h1>Lost  card</h1><p>Open the <b>app</b>,\n then <i>freeze</i> it.<br>Done.</p>
      <script>no()</script><ul><li>one</li><li>two</li></ul>
      <table><tr><td>fee</td><td>3 &euro;</td></tr></table><pre>a\nb</pre></main>
      <footer>no</footer></body></html>"""
    (document,) = read(write(tmp_path / "page.html", page))
    assert document.text.splitlines() == [
        "Lost card",
        "Open the app, then freeze it.",
        "Done.",
        "one",
        "two",
        "fee 3 €",
        "a",
        "b",
    ]
    (document,) = read(write(tmp_path / "bare.htm", "just words<p>and more"))
    assert document.text == "just words\nand more"


def pdf(*pages: str) -> bytes:
    """A PDF with one line of Helvetica per page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {5 + 2 * i} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>"
        )
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer<</Size {size}/Root 1 0 R>>\n"
    return data + f"{tail}startxref\n{len(data)}\n%%EOF\n".encode()


def test_pdf_gives_the_text_of_its_pages(tmp_path: Path) -> None:
    (document,) = read(write(tmp_path / "manual.pdf", pdf("Reset the router.", "Call us.")))
    assert document.text == "Reset the router.\n\nCall us."


def test_a_pattern_reads_files_in_order_and_names_them_from_its_folder(tmp_path: Path) -> None:
    for name in ("b/two.md", "b/c/three.md", "one.md", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    origins = [document.origin for document in read(tmp_path / "**" / "*.md")]
    assert origins == ["b/c/three.md", "b/two.md", "one.md"]


def test_package_members_are_read_like_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "help_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("help/a.json.gz", gzip.compress(json.dumps([{"text": "A"}]).encode()))
        wheel.writestr("help/b.txt", "B")
        wheel.writestr("help/code.py", "raise SystemExit")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder = tmp_path / "cache" / "packages" / f"help-texts-1.0-{sha256[:16]}"
    folder.mkdir(parents=True)
    archive.rename(folder / archive.name)
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path / "cache"))
    package = {"name": "s", "license": "MIT", "package": "help_texts", "version": "1.0"}

    def source(*files: str) -> SourceConfig:
        return SourceConfig.model_validate({**package, "sha256": sha256, "files": list(files)})

    documents = list(read_source(source("help/*.gz", "help/b.*"), LIMIT))
    assert [(d.text, d.origin) for d in documents] == [
        ("A", "help/a.json.gz#0"),
        ("B", "help/b.txt"),
    ]
    assert source_digest(source("help/b.*")) == sha256
    with pytest.raises(
        InputError, match=r"no file of package help_texts==1\.0 matches help/\*\.pdf"
    ):
        list(read_source(source("help/*.pdf"), LIMIT))
    with pytest.raises(InputError, match=r"help_texts==1\.0/help/code\.py: unknown extension"):
        list(read_source(source("help/*.py"), LIMIT))


BAD_FILES = {
    "not UTF-8": ("a.txt", b"one\ntwo \xff", {}, r"a\.txt:2: not UTF-8 \(byte 0xff\)"),
    "UTF-16": ("a.md", "text".encode("utf-16"), {}, r"a\.md:1: not UTF-8"),
    "not UTF-8 line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', {}, r"a\.jsonl:2: not UTF-8"),
    "broken line": ("a.jsonl", '{"text": "a"}\n{"text": ', {}, r"a\.jsonl:2: not valid JSON"),
    "broken JSON": ("a.json", '[\n{"text": }]', {}, r"a\.json:2: not valid JSON"),
    "broken YAML": ("a.yml", "a: 1\nb: [", {}, r"a\.yml:\d: not valid YAML"),
    "unsafe YAML": (
        "a.yml",
        "- !!python/object/apply:os.abort []",
        {},
        r"a\.yml:1: not valid YAML",
    ),
    "deep JSON": ("a.json", "[" * 100_000, {}, "nested too deeply"),
    "deep YAML": ("a.yml", "[" * 20_000, {}, "nested too deeply"),
    "huge number": ("a.jsonl", '{"text": ' + "9" * 900 + "e999999999}", {}, "wants `text`"),
    "broken gzip": ("a.json", b"", {}, r"a\.json:1: not valid JSON"),
    "broken PDF": ("a.pdf", b"%PDF-1.4 nothing", {}, r"a\.pdf: not a readable PDF"),
    "unknown extension": ("a.docx", b"", {}, r"unknown extension '\.docx'; known: \.jsonl"),
    "a list in a line": ("a.jsonl", "[]", {}, r"a\.jsonl:1: a record must be an object"),
    "no known field": ("a.jsonl", '{"body": "x", "n": 1}', {}, r"fields: body, n\. A template"),
    "text is a number": ("a.jsonl", '{"text": 1}', {}, r"wants `text` \(a string\)"),
    "half a surrogate": ("a.jsonl", '{"text": "\\ud800"}', {}, "surrogate"),
    "no list": ("a.json", '{"docs": [], "n": 1}', {}, "name the list's key with `records`: docs"),
    "no such key": ("a.json", '{"docs": []}', {"records": "doc"}, "no key 'doc'; found: docs"),
    "records of lines": ("a.jsonl", "{}", {"records": "docs"}, "`records` is for .json and .yml"),
    "messages no list": ("a.jsonl", '{"messages": "hi"}', {}, "`messages` must be a list"),
    "no content": ("a.jsonl", '{"messages": [{"role": "user"}]}', {}, "message 0 must have"),
    "bad role": (
        "a.jsonl",
        '{"messages": [{"role": "bot", "content": "x"}]}',
        {},
        "message 0 has the role 'bot'; known roles: system, user, assistant",
    ),
    "turn is no string": ("a.yml", "- [hi, 42]", {"turns": True}, "record 0: `turns` wants a list"),
    "unknown field": (
        "a.json",
        '[{"title": "x", "tags": []}]',
        {"text": "{titel}"},
        r"a\.json, record 0: no field 'titel' for the template '\{titel\}'; fields: title",
    ),
    "attribute of a field": (
        "a.json",
        '[{"title": "x"}]',
        {"text": "{title.__class__}"},
        "no field 'title.__class__'",
    ),
    "broken template": ("a.json", '[{"title": "x"}]', {"text": "{title:d}"}, "is not valid"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, case: str) -> None:
    name, content, keys, message = BAD_FILES[case]
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path / name, content), **keys)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_gzip_or_is_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    for data in (b'{"text": "x"}', gzip.compress(b'{"text": "x"}\n' * 100)[:-12]):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
            read(file)


def test_a_pattern_that_matches_nothing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\.md: no such file"):
        read(tmp_path / "*.md")
    with pytest.raises(InputError, match="is a directory; name its files"):
        read(tmp_path)


def test_documents_over_the_limit_are_refused_with_line_limit_and_key(tmp_path: Path) -> None:
    big = "x" * 10_000_000
    lines = write(tmp_path / "a.jsonl", f'{{"text": "small"}}\n{{"text": "{big}"}}\n')
    message = (
        rf"{re.escape(str(lines))}:2: a document of more than 1,000 bytes.*"
        r"`corpus\.max_document_bytes`"
    )
    with pytest.raises(InputError, match=message):
        read(lines)
    with pytest.raises(InputError, match=r"a\.txt: a document of more than 1,000 bytes"):
        read(write(tmp_path / "a.txt", big))
    with pytest.raises(InputError, match=r"a\.json, record 1: a document of more than"):
        read(write(tmp_path / "a.json", json.dumps([{"text": "ok"}, {"text": "안" * 334}])))
    assert len(read(write(tmp_path / "b.txt", "x" * LIMIT))) == 1


def test_normalise() -> None:
    assert normalise("\n\u1112\u1161\u11ab\0 a \t\r\n\r\nb\rc  \n\n") == "한 a\n\nb\nc"
    assert normalise(" \n\t\0") == ""


def test_capture_file_takes_ids_from_the_lines(tmp_path: Path) -> None:
    lines = ['{"id": "x-1", "text": "one"}', "", json.dumps({"messages": CHAT}), '{"text": ""}']
    file = write(tmp_path / "f.jsonl", "\n".join(lines))
    documents = list(read_jsonl(file))
    assert [d.id for d in documents] == ["x-1", "f.jsonl#3", "f.jsonl#4"]
    assert documents[1].messages == CHAT
    twice = write(tmp_path / "g.jsonl", '{"id": 7, "text": "a"}\n{"id": "7", "text": "b"}')
    with pytest.raises(InputError, match=r"g\.jsonl:2: the id '7' stands on line 1 already"):
        list(read_jsonl(twice))
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match=r"wants a \.jsonl file"):
        list(read_jsonl(tmp_path / "f.txt"))
    with pytest.raises(InputError, match=r"g\.jsonl:1: a document of more than 5 bytes"):
        list(read_jsonl(twice, max_document_bytes=5))
