"""The chat page in a real browser, against a real server."""

from __future__ import annotations

import http.client
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from served import NAME, PROMPTS, port_of, running, tiny_release

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_release(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def service(release: Path) -> Iterator[dict[str, Any]]:
    with running(release) as (_, found):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, service: dict[str, Any]) -> Iterator[Page]:
    """The page, opened by an English reader; anything on the console is an error."""
    with browser.new_context(locale="en-US") as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(service["chat"])
        page.get_by_role("heading", level=1, name=NAME).wait_for()
        yield page
        assert complaints == []


def test_a_question_is_answered(page: Page) -> None:
    question = page.get_by_label("Your question")
    question.fill("Where is my\ncard?")
    question.press("Enter")
    answer = page.locator("#messages > .assistant")
    note = answer.locator(".note")
    note.wait_for()
    assert re.search(r"\d+ tokens, \d+ per second", note.inner_text())
    assert answer.locator(".text").inner_text().strip()
    assert page.locator("#messages > .user .text").inner_text() == "Where is my\ncard?"
    assert question.input_value() == ""
    assert page.get_by_role("button", name="Send").is_visible()


def test_the_whole_conversation_is_sent(page: Page) -> None:
    question = page.get_by_label("Your question")
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    for number in range(2):
        question.fill(f"Question {number}")
        question.press("Enter")
        page.locator("#messages .note").nth(number).wait_for()
    roles = [message["role"] for message in sent[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#messages > li").count() == 0
    question.fill("Another one")
    question.press("Enter")
    page.locator("#messages .note").wait_for()
    assert sent[-1]["messages"] == [{"role": "user", "content": "Another one"}]


def test_the_welcome_tells_about_the_model(page: Page) -> None:
    assert page.title() == f"{NAME} · Seodang"
    assert "parameters · Q8_0 · Apache-2.0" in page.locator("#model-facts").inner_text()
    assert page.locator("#description").inner_text() == "Synthetic & random."
    assert page.locator("#prompts button").all_inner_texts() == PROMPTS
    assert "check what matters" in page.locator("#caution").inner_text()
    page.locator("#prompts button").nth(1).click()
    page.locator("#messages .note").wait_for()
    assert page.locator("#messages > .user .text").inner_text() == PROMPTS[1]


def test_enter_while_composing_hangul_does_not_send(page: Page) -> None:
    question = page.get_by_label("Your question")
    question.fill("카드")
    question.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    question.press("Shift+Enter")
    assert question.input_value() == "카드\n"
    assert page.locator("#messages > li").count() == 0


def test_an_answer_can_be_stopped(browser: Browser, release: Path) -> None:
    with running(release) as (_, service):
        # Answers without end take every place, so that the page's question waits for its turn.
        busy = []
        for _ in range(4):
            connection = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=60)
            request = {"prompt": "a", "n_predict": -1, "ignore_eos": True, "stream": True}
            connection.request("POST", "/completion", json.dumps(request))
            assert connection.getresponse().readline().startswith(b"data:")
            busy.append(connection)
        page = browser.new_page(locale="en-US")
        page.goto(service["chat"])
        question = page.get_by_label("Your question")
        question.fill("Are you there?")
        question.press("Enter")
        page.get_by_role("button", name="Stop answering").click()
        page.get_by_text("You stopped this answer.").first.wait_for()
        assert page.get_by_role("button", name="Send").is_visible()
        for connection in busy:
            connection.close()
        question.fill("And now?")
        question.press("Enter")
        page.get_by_text("tokens").wait_for()
        page.close()


def test_a_server_that_went_away(browser: Browser, release: Path) -> None:
    with running(release) as (process, service):
        page = browser.new_page(locale="en-US")
        page.goto(service["chat"])
        page.get_by_role("heading", level=1, name=NAME).wait_for()
        process.kill()
        process.wait()
        page.get_by_label("Your question").fill("Hello?")
        page.get_by_role("button", name="Send").click()
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "Check that its server is still running" in alert.inner_text()
        alert.get_by_role("button", name="Try again").click()
        alert.wait_for()
        assert page.locator("#messages > .assistant").count() == 1
        page.close()


def test_a_question_longer_than_the_context(browser: Browser, service: dict[str, Any]) -> None:
    with browser.new_context(locale="en-US") as context:
        page = context.new_page()
        page.goto(service["chat"])
        page.get_by_label("Your question").fill("long " * 3900)
        page.get_by_role("button", name="Send").click()
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "longer than the model can read" in alert.inner_text()


def test_korean_readers_get_korean(browser: Browser, service: dict[str, Any]) -> None:
    with browser.new_context(locale="ko-KR") as context:
        page = context.new_page()
        page.goto(service["chat"])
        page.get_by_label("질문", exact=True).fill("안녕하세요")
        page.get_by_role("button", name="보내기").click()
        page.locator("#messages .note").wait_for()
        assert page.locator("html").get_attribute("lang") == "ko"


def test_nothing_of_an_answer_becomes_markup(page: Page) -> None:
    rendered = """async (text) => {
        const { render } = await import("./markdown.js");
        const box = document.createElement("div");
        box.append(...render(text));
        return box.innerHTML;
    }"""
    for text, html in [
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("# Card\nOne\nTwo", "<h3>Card</h3><p>One<br>Two</p>"),
        (
            "1. a **b**\n\n2. `c*d*`",
            "<ol><li>a <strong>b</strong></li><li><code>c*d*</code></li></ol>",
        ),
        ("- x\n  y\n\nz", "<ul><li>x<br>y</li></ul><p>z</p>"),
        ("```sh\n# a <b>\n", "<pre><code># a &lt;b&gt;\n\n</code></pre>"),
        ("2 * 3 * 4 and **open", "<p>2 * 3 * 4 and **open</p>"),
    ]:
        assert page.evaluate(rendered, text) == html
