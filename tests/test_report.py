"""The report, on synthetic measurements (no model produced these numbers)."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.evaluation import gate, plots, report
from seodang.recipe import GateConfig, Margins

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _model(
    kl: float, agreement: float, perplexity: float, error: float, speed: float, *, whole: bool
) -> dict[str, float]:
    parameters = 134_515_008 if whole else 70_800_192
    return {
        "kl": kl,
        "top1_agreement": agreement,
        "perplexity": perplexity,
        "calibration_error": error,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "tokens_per_second": speed,
    }


def _curve(seed: int, start: float, end: float, steps: int = 180) -> list[dict[str, Any]]:
    step = np.arange(1, steps + 1)
    noise = np.random.default_rng(seed).normal(0, 0.12, steps)
    loss = end + (start - end) * np.exp(-step / 35) + noise
    return [
        {
            "step": int(s),
            "tokens": int(s) * 1024,
            "loss": float(value),
            "kd_loss": float(value) - 0.05,
            "cross_entropy": float(value) + 0.4,
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
        }
        for s, value in zip(step, loss, strict=True)
    ]


def _bins(shift: float) -> list[dict[str, float]]:
    middle = (np.arange(15) + 0.5) / 15
    count = np.linspace(600, 150, 15).astype(int) + (np.arange(15) == 14) * 863
    accuracy = np.clip(middle - shift * np.sin(np.pi * middle), 0, 1)
    return [
        {"confidence": float(c), "accuracy": float(a), "count": int(n)}
        for c, a, n in zip(middle, accuracy, count, strict=True)
    ]


def _digest(number: int) -> str:
    return f"{number:x}" * 64


def synthetic() -> dict[str, Any]:
    """Everything that a full run gives the report, made up."""
    models = {
        "teacher": _model(0.0, 1.0, 12.1, 0.021, 552, whole=True),
        "student": _model(0.624, 0.661, 22.4, 0.034, 1312, whole=False),
        "cross_entropy": _model(1.103, 0.552, 29.8, 0.092, 1307, whole=False),
        "untrained": _model(6.04, 0.048, 5211.0, 0.31, 1315, whole=False),
    }
    beats = {
        "untrained": Margins(kl=1.0, top1_agreement=0.1),
        "cross_entropy": Margins(kl=0.1),
    }
    config = GateConfig(max_kl=0.8, min_top1_agreement=0.6, beats=beats)
    source = {
        "name": "bank help documents",
        "version": "inspect_evals 0.26.0",
        "license": "MIT",
        "sha256": _digest(11),
        "attribution": "tau2-bench, Copyright Sierra (banking_knowledge)",
        "documents": 96,
        "tokens": 26_012,
    }
    manual = source | {"name": "telecom technical support manual", "documents": 41, "tokens": 9120}
    weights = {"name": "SmolLM2-135M-Instruct", "license": "Apache-2.0", "version": "0.1.2"}
    return {
        "title": "customer-service",
        "description": "Answers from the policies and help documents of a bank, a shop, "
        "an airline and a telecom operator. Synthetic numbers.",
        "metrics": {
            "models": models,
            "calibration": {
                "teacher": _bins(0.02),
                "student": _bins(0.06),
                "cross_entropy": _bins(0.16),
            },
            "held_out": {"documents": 31, "positions": 6482},
            "gate": gate.check(models, config),
        },
        "curves": {"student": _curve(1, 6.1, 2.2), "cross_entropy": _curve(2, 6.5, 2.6)},
        "samples": [
            {
                "prompt": "How do I request a replacement debit card?",
                "answers": {
                    "teacher": "You can request a replacement card in the app, at a branch, or by "
                    "phone.\n\n1. Open the app.\n2. Choose Cards.\n3. Choose Replace.",
                    "student": "You can request a replacement debit card by calling the number on "
                    "your statement. A fee may apply.",
                    "cross_entropy": "To request a card, the customer the customer must the card.",
                },
            },
            {
                "prompt": "휴대폰에 신호가 잡히지 않아요. 무엇부터 해 볼까요?",
                "answers": {
                    "teacher": "비행기 모드를 껐다 켜 보세요.",
                    "student": "",
                    "cross_entropy": "전화",
                },
            },
        ],
        "provenance": [
            {
                "kind": "corpus",
                "digest": _digest(1),
                "config": {"max_length": 384, "held_out": 0.12},
                "inputs": {},
                "summary": {"documents": {"train": 228, "held_out": 31}},
                "sources": [source, manual],
            },
            {
                "kind": "soft-labels",
                "digest": _digest(2),
                "config": {"estimator": "head-tail", "threshold": 0.06},
                "inputs": {"corpus": _digest(1), "teacher": _digest(9)},
                "summary": {"tokens": 41_210, "bytes_per_token": 61.2},
                "sources": [source, manual, weights],
            },
            {
                "kind": "student",
                "digest": _digest(3),
                "config": {"layers": 12, "epochs": 1},
                "inputs": {"soft-labels": _digest(2), "corpus": _digest(1)},
                "summary": {},
                "sources": [],
            },
        ],
    }


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(**synthetic())


class _Tags(HTMLParser):
    """Start tags with their attributes, the ids, and the text outside of ``<style>``."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        self.text = re.sub(r"\s+", " ", "".join(self.words))
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def test_numbers_and_parts_are_present(page: str) -> None:
    parsed = _Tags(page)
    assert parsed.open == []
    assert "Gate passed" in parsed.text
    assert (
        "The student keeps 66.1% of the teacher’s next-token choices, "
        "and is 1.9× smaller and 2.4× faster." in parsed.text
    )
    assert "Measured at 6,482 positions of 31 documents" in parsed.text
    for shown in ("0.624", "1.103", "66.1%", "22.4", "0.034", "70.8 M", "283 MB", "1,312"):
        assert shown in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 8
    assert "An illustration, not evidence" in parsed.text
    assert "비행기 모드를 껐다 켜 보세요." in parsed.text
    assert "(an empty answer)" in parsed.text
    assert parsed.text.count("✓ passed") == 6
    for name in ("MIT", "Apache-2.0", "tau2-bench, Copyright Sierra", _digest(3)):
        assert name in parsed.text
    assert '"estimator": "head-tail"' in parsed.text


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    parsed = _Tags(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in {"href", "xlink:href", "aria-labelledby"} and value and value != "data:,":
                assert value.removeprefix("#") in parsed.ids
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)


def test_every_table_header_has_a_scope_and_every_picture_a_name(page: str) -> None:
    for tag, attributes in _Tags(page).tags:
        if tag == "th":
            assert attributes.get("scope") in {"row", "col"}
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_nothing_is_loaded(page: str) -> None:
    parsed = _Tags(page)
    assert not {"script", "img", "iframe", "object", "embed", "base"} & {t for t, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "http:" not in page
    assert "https:" not in page


def test_two_renders_are_equal(page: str) -> None:
    assert report.render(**synthetic()) == page


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>\"&{{ 7 * 7 }}"


def _poison(value: Any) -> Any:
    """Put ``HOSTILE`` after every text, and into the keys of free mappings."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [_poison(item) for item in value]
    if isinstance(value, dict):
        return {key: _poison(item) for key, item in value.items()}
    return value


def test_everything_given_is_escaped() -> None:
    given_ = synthetic()
    clean = _Tags(report.render(**given_)).tags
    given_["provenance"][0]["config"][HOSTILE] = HOSTILE
    given_["provenance"][2]["inputs"][HOSTILE] = _digest(5)
    given_["metrics"]["gate"]["checks"][0]["name"] = HOSTILE
    poisoned = {
        key: _poison(value) if key in {"title", "description", "samples", "provenance"} else value
        for key, value in given_.items()
    }
    page = report.render(**poisoned)
    parsed = _Tags(page)
    assert "<script" not in page
    assert "<img" not in page
    assert HOSTILE in "".join(parsed.words)
    # One input was added: two more elements name it, and nothing else may appear.
    assert len(parsed.tags) - len(clean) <= 4
    assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in clean}
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_template_trusts_nothing() -> None:
    source = (Path(report.__file__).parent / report.TEMPLATE).read_text()
    assert not re.search(r"\|\s*safe|autoescape", source)


def test_failed_gate_and_worse_student_are_said_plainly() -> None:
    given_ = synthetic()
    models = given_["metrics"]["models"]
    models["student"] |= {
        "kl": 1.5,
        "top1_agreement": 0.5,
        "tokens_per_second": 276,
        "bytes": 2 * models["teacher"]["bytes"],
    }
    config = GateConfig(max_kl=1.0, beats={"cross_entropy": Margins()})
    given_["metrics"]["gate"] = gate.check(models, config)
    text = _Tags(report.render(**given_)).text
    assert "Gate failed" in text
    assert "3 of 3 requirements of the recipe do not hold" in text
    assert "and is 2.0× larger and 2.0× slower" in text
    assert "KL is no better than with cross-entropy only" in text
    assert "Agreement is no better than with cross-entropy only" in text
    assert "✗ failed" in text
    assert "✓ passed" not in text


def test_equal_size_and_speed_are_not_called_better() -> None:
    given_ = synthetic()
    models = given_["metrics"]["models"]
    for key in ("bytes", "tokens_per_second"):
        models["student"][key] = 1.02 * models["teacher"][key]
    text = _Tags(report.render(**given_)).text
    assert "and is about the same size and about as fast." in text


def test_without_checks_no_gate_is_claimed() -> None:
    given_ = synthetic()
    given_["metrics"]["gate"] = gate.check(given_["metrics"]["models"], GateConfig())
    text = _Tags(report.render(**given_)).text
    assert "No gate was set" in text
    assert "Gate passed" not in text


def test_empty_run_says_what_is_left_out() -> None:
    page = report.render(
        title="empty", description="", metrics={}, curves={}, samples=[], provenance=[]
    )
    parsed = _Tags(page)
    assert parsed.open == []
    assert "The student was not measured." in parsed.text
    assert parsed.text.count("Left out:") == 5
    assert not any(tag == "svg" for tag, _ in parsed.tags)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_missing_and_broken_numbers_do_not_break_it(data: st.DataObject) -> None:
    given_ = copy.deepcopy(synthetic())
    models = given_["metrics"]["models"]
    for model in data.draw(st.sets(st.sampled_from(sorted(models)))):
        del models[model]
    broken = st.sampled_from([None, math.nan, math.inf, 0.0, 0, 1e12])
    for values in models.values():
        values.update(data.draw(st.dictionaries(st.sampled_from(sorted(values)), broken)))
    for part in ("curves", "samples", "provenance"):
        if data.draw(st.booleans()):
            given_[part] = type(given_[part])()
    given_["curves"] = {
        model: [
            row | {"kd_loss": data.draw(broken)} for row in rows[: data.draw(st.integers(0, 3))]
        ]
        for model, rows in given_["curves"].items()
    }
    given_["metrics"]["gate"] = gate.check(models, GateConfig(max_kl=1.0))
    page = report.render(**given_)
    assert "nan" not in re.findall(r"[a-z]+", _Tags(page).text.lower())
    assert not re.search(r"\bnan\b", page)


def test_loss_curve_needs_two_steps_and_skips_gaps() -> None:
    rows = _curve(3, 5.0, 2.0)
    assert plots.loss_curve("student", rows[:1]) is None
    holes = [row | {"kd_loss": None} if i % 7 == 3 else row for i, row in enumerate(rows)]
    plot = plots.loss_curve("student", holes)
    assert plot is not None
    assert plot.title.startswith("Student: distillation loss fell from ")
    rising = plots.loss_curve("cross_entropy", [row | {"loss": row["step"]} for row in rows])
    assert rising is not None
    assert "did not fall" in rising.title


def test_calibration_title_has_the_right_sign() -> None:
    timid = [{"confidence": 0.4, "accuracy": 0.6, "count": 10}]
    sure = [{"confidence": 0.9, "accuracy": 0.6, "count": 10}]
    empty = [{"confidence": 0.5, "accuracy": None, "count": 0}]
    titles = [plots.calibration("student", bins) for bins in (timid, sure)]
    assert [plot and plot.title for plot in titles] == [
        "Student: underconfident by 20.0 points",
        "Student: overconfident by 30.0 points",
    ]
    assert plots.calibration("student", empty) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 15))
def test_smoothing_is_the_mean_of_the_neighbours(values: list[float], window: int) -> None:
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    assert plots.smooth(np.array(values), window) == pytest.approx(expected, abs=1e-8)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_it_on_a_phone(page: str, tmp_path: Path, scheme: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    file = tmp_path / "report.html"
    file.write_text(page)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        messages: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        for part in tab.locator("details > summary").all():
            part.click()
        width = tab.evaluate("document.documentElement.scrollWidth")
        outside = tab.evaluate(
            """() => [...document.querySelectorAll('main *')].filter(element =>
                !element.closest('.scroll, math, .hidden') &&
                element.getBoundingClientRect().right > 391).map(element => element.outerHTML)"""
        )
        paper, ink = (
            tab.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("backgroundColor", "color")
        )
        line = tab.evaluate("getComputedStyle(document.querySelector('#size svg text')).fill")
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert width == 390
    assert outside == []
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink, line)]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")
    assert (brightness[0] < brightness[2]) == (scheme == "dark")


def test_palette_can_be_read_on_both_papers() -> None:
    """WCAG 2.2 contrast of 4.5 for every colour that text is written in."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    for name, colours in plots.PALETTE.items():
        if name not in {"rule", "card"}:
            for colour, paper in zip(colours, plots.PALETTE["card"], strict=True):
                assert contrast(colour, paper) >= 4.5, name


def test_fixture_is_json_like_the_files_it_stands_for() -> None:
    assert json.loads(json.dumps(synthetic(), allow_nan=False)) == synthetic()
