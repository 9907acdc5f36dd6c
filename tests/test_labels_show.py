"""Looking at soft labels: the right label on the right token, safely shown everywhere."""

from __future__ import annotations

import io
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from seodang.causal_lm import CausalLM
from seodang.softlabels import open as open_store
from seodang.softlabels import show
from seodang.softlabels.observed import observed_weights
from seodang.softlabels.show_page import render
from seodang.softlabels.spelling import Spelling, laid_out, named, visible
from seodang.softlabels.surprise import BANDS, COLOURS, INK, labels, percent, shown_tokens
from tiny import tiny_tokenizer
from tiny_labels import DOCUMENTS, HOSTILE, make_store, run_labels

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
TOKENIZER = tiny_tokenizer()
SPELLING = Spelling(TOKENIZER)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return run_labels(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and stores of the same documents by several estimators."""
    folder = tmp_path_factory.mktemp("show")
    make_store(folder, "whole", "--estimator", "residual", "--k", "600")
    make_store(folder, "few", "--estimator", "residual", "--k", "150")
    make_store(folder, "sampled", "--estimator", "sampled")
    make_store(folder, "head-tail", "--estimator", "head-tail")
    return folder


def test_a_token_has_the_label_of_the_position_before_it(folder: Path) -> None:
    """Against the teacher itself: a shift by one would be wrong nearly everywhere."""
    model = CausalLM.load(folder / "teacher")
    store = open_store(folder / "whole")
    compared = 0
    for sequence in store:
        (hidden_TH,) = model.hidden_states([sequence.token_ids])
        with torch.inference_mode():
            log_probs_TV = model.log_probs(hidden_TH).numpy()
        for label in labels(sequence, store.header, SPELLING, 3):
            if label.came is None:
                assert label.position == len(sequence.token_ids) - 1
                continue
            assert label.came.id == sequence.token_ids[label.position + 1]
            expected = -log_probs_TV[label.position, label.came.id]
            assert label.surprise == pytest.approx(expected, abs=0.15)  # a level of the store
            best = np.argsort(-log_probs_TV[label.position])
            assert {entry.id for entry in label.largest} <= set(best[:6].tolist())
            compared += 1
    assert compared > 60


def test_only_labelled_tokens_have_an_expectation(folder: Path) -> None:
    store = open_store(folder / "few")
    sequence = store[1]
    found = list(labels(sequence, store.header, SPELLING, 2))
    tokens = shown_tokens(sequence, found, SPELLING)
    expected = {t.position for t in tokens if t.expected is not None}
    assert expected == {p + 1 for p in sequence.labelled.tolist()} - {len(tokens)}
    words = "".join(t.text for t in tokens if t.expected is None)
    assert "카드를 잃어버렸어요. What now?" in words  # the user's turn
    assert "정지할" not in words
    assert "".join(t.text for t in tokens) == TOKENIZER.decode(sequence.token_ids.tolist())


def test_what_is_not_stored_has_no_number(folder: Path) -> None:
    store = open_store(folder / "few")
    seen = {True: 0, False: 0}
    for sequence in store:
        for label in labels(sequence, store.header, SPELLING, 200):
            assert label.stored == len(label.largest) == 150
            if label.came is None:
                continue
            stored = label.came.id in {entry.id for entry in label.largest}
            seen[stored] += 1
            assert (label.surprise is not None) == stored
            assert (label.band == len(BANDS) - 1) != stored
            (row,) = show.rows(sequence, [label], SPELLING)
            assert (row["surprise"] is not None) == (row["next"]["weight"] > 0) == stored
    assert min(seen.values()) > 5


def test_what_was_drawn_is_called_an_estimate(folder: Path) -> None:
    def estimates(name: str) -> set[bool]:
        store = open_store(folder / name)
        return {
            e.estimate
            for s in store
            for x in labels(s, store.header, SPELLING, 9)
            for e in x.largest
        }

    assert estimates("whole") == {False}
    assert estimates("sampled") == {True}
    assert estimates("head-tail") == {False, True}
    store = open_store(folder / "head-tail")
    threshold = store.header.parameters["threshold"]
    for label in labels(store[0], store.header, SPELLING, 99):
        for entry in label.largest:
            assert entry.estimate == (entry.weight == pytest.approx(threshold))
    assert percent(0.06, estimate=True) == "≈ 6.0 %"


def test_bands_are_those_of_the_legend(folder: Path) -> None:
    store = open_store(folder / "whole")
    for sequence in store:
        weights = observed_weights(sequence).tolist()
        for label, weight in zip(labels(sequence, store.header, SPELLING, 0), weights, strict=True):
            if label.came is not None:
                assert label.came.weight == pytest.approx(weight)
                assert weight >= BANDS[label.band][0]
                assert label.band == 0 or weight < BANDS[label.band - 1][0]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_pieces_of_a_text_join_to_it(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    pieces = SPELLING.text(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_any_ids_can_be_spelled(ids: list[int]) -> None:
    pieces = SPELLING.text(ids)
    assert len(pieces) == len(ids)
    for token, piece in zip(ids, pieces, strict=True):
        assert named(token, piece)
        assert named(token, SPELLING.token(token)).strip() != ""


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    ids = TOKENIZER("a獸b")["input_ids"]
    pieces = SPELLING.text(ids)
    assert pieces[0] == "a"
    assert pieces[-2:] == ["獸", "b"]
    assert set(pieces[1:-2]) == {""}
    assert named(ids[1], SPELLING.token(ids[1])) == f"⟨{ids[1]}⟩"


def test_numbers_spell_where_there_is_no_tokenizer() -> None:
    assert Spelling().text([3, 1]) == ["3", "1"]
    assert (Spelling().token(7), Spelling().separator) == ("7", " ")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_shown_text_obeys_nothing(text: str) -> None:
    for shown in (visible(text), laid_out(text), named(5, text)):
        kept = shown if shown != laid_out(text) else shown.replace("\n", "").replace("\t", "")
        assert not [c for c in kept if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        assert not set(kept) & set("\u200e\u200f\u202a\u202d\u202e\u2066\u2067\u2069")
    assert visible(visible(text)) == visible(text)


def test_spaces_of_a_token_are_seen() -> None:
    assert [named(1, t) for t in (" the", "  ", "a b", "\n ", "")] == [
        "␣the",
        "␣␣",
        "a b",
        "↵␣",
        "⟨1⟩",
    ]


def coloured(folder: Path, name: str, *numbers: int) -> str:
    """What a terminal with all colours would be sent."""
    store = open_store(folder / name)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=500)
    console.print(show.legend(store))
    for number in numbers:
        show.print_coloured(console, store, number, SPELLING, 4, 3)
    return file.getvalue()


def test_a_terminal_is_sent_colours_and_none_of_the_texts_controls(folder: Path) -> None:
    sent = coloured(folder, "few", 2)
    assert "\x1b[31m " not in sent  # the text's own escape sequence
    assert "␛[31m" in re.sub(r"\x1b\[[0-9;]*m", "", sent)
    assert "⟨U+202E⟩" in re.sub(r"\x1b\[[0-9;]*m", "", sent)
    used = set(re.findall(r"48;2;(\d+);(\d+);(\d+)", sent))
    scale = {tuple(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c, _ in COLOURS[1:]}
    assert used == scale  # the legend shows all of them
    plain = re.sub(r"\x1b\[[0-9;]*m", "", sent)
    assert "document <i>evil</i>, " in plain
    assert "beyond the stored ids" in plain
    rows = [line for line in plain.splitlines() if re.match(r"\s+\d+ ", line)]
    assert len(rows) == 4
    for row in rows:
        assert re.search(r"beyond|\d\.\d\d +\d+\.\d\d", row)


def test_a_terminal_says_what_is_estimated(folder: Path) -> None:
    assert "≈" in coloured(folder, "sampled", 0)
    assert "≈" not in coloured(folder, "few", 0)


class Page(HTMLParser):
    """The page's tags, and what stands in its texts outside of the tooltips."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.tips: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.tags.append((tag, names))
        if tag in {"meta", "link", "br"}:
            return
        kind = str(names.get("class") or "")
        self.open.append((tag, kind))
        if kind == "text":
            self.texts.append("")
        if kind == "tip":
            self.tips.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        kinds = [kind for _, kind in self.open]
        if "tip" in kinds:
            self.tips[-1] += data
        elif "text" in kinds:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return render(open_store(folder / "few"), [0, 1, 2], SPELLING, 3)


def test_page_holds_every_token_once_and_no_markup_of_the_text(folder: Path, page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not {"iframe", "img", "a", "style"} & {tag for tag, _ in parsed.tags[20:]}
    store = open_store(folder / "few")
    for shown, sequence in zip(parsed.texts, store, strict=True):
        text = TOKENIZER.decode(sequence.token_ids.tolist())
        assert shown.replace("·", "").removesuffix("▷") == laid_out(text)
    assert HOSTILE.split("\x1b")[0] in parsed.texts[2]
    assert "<script>alert" not in page
    assert "<i>evil" not in page
    assert page == render(open_store(folder / "few"), [0, 1, 2], SPELLING, 3)


def test_page_can_be_used_without_a_mouse(page: str, folder: Path) -> None:
    parsed = Page(page)
    described = [str(a["aria-describedby"]) for _, a in parsed.tags if "aria-describedby" in a]
    tips = [a["id"] for _, a in parsed.tags if a.get("role") == "tooltip"]
    assert described == tips
    assert len(set(tips)) == len(tips)
    labelled = sum(len(sequence.labelled) for sequence in open_store(folder / "few"))
    assert len(tips) == labelled
    for _, attributes in parsed.tags:
        if "aria-describedby" in attributes:
            assert attributes["tabindex"] == "0"
            assert attributes["role"] == "button"
    beyond = [tip for tip in parsed.tips if "beyond" in tip]
    assert beyond
    assert all("lies beyond the 150 stored ids" in t and "surprise" not in t for t in beyond)


def test_page_loads_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert "src" not in attributes, tag
        assert str(attributes.get("href", "data:,")).startswith("data:")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(page: str, tmp_path: Path, scheme: Any) -> None:
    from playwright.sync_api import expect, sync_playwright

    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    messages: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(
            viewport={"width": 390, "height": 800}, color_scheme=scheme, has_touch=True
        )
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("dialog", lambda dialog: messages.append(dialog.message))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        shown = tab.locator(".tip:visible")

        def shows(token: Any) -> None:
            """The label of this token and of no other is seen."""
            expect(shown).to_have_count(1)
            expect(shown).to_have_id(str(token.get_attribute("aria-describedby")))

        first, second = (tab.locator(".text").nth(i).locator("[tabindex]") for i in (0, 1))
        expect(shown).to_have_count(0)
        first.nth(3).tap()
        shows(first.nth(3))
        tab.keyboard.press("ArrowRight")
        shows(first.nth(4))
        tab.keyboard.press("Escape")
        expect(shown).to_have_count(0)
        tab.keyboard.press("End")
        shows(first.last)
        tab.keyboard.press("Tab")  # a text is one stop
        shows(second.first)
        tab.set_viewport_size({"width": 1200, "height": 800})
        first.nth(2).hover()  # the pointer was used last
        shows(first.nth(2))
        token, tip = first.nth(2).bounding_box(), shown.bounding_box()
        assert token is not None
        assert tip is not None
        assert abs(tip["x"] - token["x"]) < tip["width"]
        assert min(tip["x"], 1200 - tip["x"] - tip["width"]) >= 0
        tab.keyboard.press("ArrowRight")  # now a key was, though the pointer is still there
        shows(second.nth(1))
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 300) == (scheme == "dark")


def test_colours_can_be_read() -> None:
    """WCAG 2.2 contrast of 4.5 for text on every band, in both schemes."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for band in COLOURS:
        for ink, paper in zip(INK, band, strict=True):
            low, high = sorted([luminance(ink), luminance(paper)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, paper
    for scheme in (0, 1):  # less likely is further from the paper, so that order can be seen
        steps = [luminance(band[scheme]) for band in COLOURS[:5]]
        assert steps == sorted(steps, reverse=scheme == 0)


def test_command_shows_sequences(run: Run, folder: Path, tmp_path: Path) -> None:
    store, teacher = folder / "few", folder / "teacher"
    code, out, _ = run("show", store, "--tokenizer", teacher, "--positions", 3)
    assert code == 0
    assert out.startswith("document card, ")
    assert len(out.splitlines()) == 4
    code, out, _ = run("show", store, "--sequence", 0, "--sequence", 2, "--json")
    assert [found["document"] for found in json.loads(out)["sequences"]] == ["card", "<i>evil</i>"]
    code, out, _ = run("show", store, "--document", "chat", "--json", "--tokenizer", teacher)
    found = json.loads(out)
    assert found["document"] == "chat"
    row = found["positions"][0]
    assert {"position", "token", "entropy", "next", "surprise", "entries"} == set(row)
    assert row["next"]["id"] == open_store(store)[1].token_ids[row["position"] + 1]
    code, out, _ = run("show", store, "--sequences", 2, "--positions", 1)
    assert [line[:8] for line in out.splitlines()][::2] == ["document", "document"]
    html = tmp_path / "page.html"
    assert run("show", store, "--sequences", 9, "--html", html)[:2] == (0, f"{html}\n")
    assert len(Page(html.read_text(encoding="utf-8")).texts) == len(DOCUMENTS)
    assert list(tmp_path.iterdir()) == [html]


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "beyond": (["--sequence", "3"], "has sequences 0 to 2, not 3"),
        "no such document": (["--document", "x"], "holds no document 'x'"),
        "both": (["--sequence", "0", "--document", "card"], "name one of them"),
        "no directory": (["--html", "nowhere/page.html"], "nowhere/page.html"),
    }.values(),
)
def test_command_refuses(run: Run, folder: Path, options: list[str], message: str) -> None:
    code, out, _ = run("show", folder / "few", *options, "--json")
    assert code in (1, 2)
    assert message in json.loads(out)["error"]
