"""python recipes/customer_service/make_tasks.py --out runs/customer_service/tasks [--quick]

Two tasks of a contact centre:

- ``routing`` (choice): which desk, or which tool, is a request for? In Korean, what merchants look
  for in PortOne's help centre (titles, headings and search tags of its documents) and the desk that
  answers for the document's category. In English, the titles of a bank's help documents (to train
  on also with one of their headings) and its departments; and requests of a shop, an airline and a
  telecom operator and their tools: those of tau2-bench's tasks are held out, those to train on are
  made (``wording.yaml``). Documents are on one side only. Half of the tags and titles are put into
  a made sentence, and so is labelled.
- ``policy`` (answer): a passage of a help document and a question about one point of it. Questions
  are made from what a document lists (point, then its value); the answer is the value as it stands
  there, or ``NO_ANSWER`` where the passage, of the same document, does not hold it. To choose from
  are ``NO_ANSWER`` and what the passage lists: values of its points, and whole entries. In English
  most questions name the point in other words than the document (``wording.yaml``), those
  held out in words that no question to train on has for it.

Three of four requests and questions to train on come without an answer, as they do in a desk.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seodang.corpus.task_writing import (
    apart,
    example,
    open_packages,
    script_options,
    write_task,
)
from seodang.corpus.tasks import Example
from seodang.packages import Package
from seodang.recipe import Language

HERE = Path(__file__).parent
DOMAINS = "inspect_evals/tau2/data/domains/"
PORTONE: Any = {
    "source": "PortOne documentation, portone-mcp-server 0.12.1",
    "license": "Apache-2.0",
}
BANK: Any = {
    "source": "tau2-bench banking documents (Sierra), inspect_evals 0.26.0",
    "license": "MIT",
}
TASKS: Any = {"source": "tau2-bench tasks (Sierra), inspect_evals 0.26.0", "license": "MIT"}
DEPARTMENTS = {
    "bank_accounts": "account services",
    "checking_accounts": "checking",
    "savings_accounts": "savings",
    "credit_cards": "credit cards",
    "business_checking_accounts": "business checking",
    "business_savings_accounts": "business savings",
    "business_credit_cards": "business credit cards",
    "buy_now_pay_later": "buy now pay later",
    "everyone_pay": "payments",
}
REFUSAL = "NO_ANSWER"
ANSWER = {
    "ko": f"문서에 적힌 대로만 답하세요. 문서에 없으면 {REFUSAL}라고 답하세요.",
    "en": f"Answer in the document's words. If it does not say, answer {REFUSAL}.",
}
HELD_OUT_EVERY = 5  # every fifth document of a desk
ROUTED_HELD_OUT_EVERY = 3  # of the bank's, of which a request each is measured
PASSAGE = 320  # characters
ASKED = 2  # times that a point is asked for, in other words or of another passage
OTHER_WORDS = 0.7  # of the English questions
ENTRY = 90  # characters of an entry that can be an answer
LABELLED = 4  # one of so many examples has its answer; the others wait for the teacher's


@dataclass(frozen=True)
class HelpDocument:
    """A help document: its category, what it is found by, and its text (Markdown)."""

    name: str
    title: str
    category: str
    tags: list[str]
    text: str
    held_out: bool = False


def main() -> None:
    """Write both tasks."""
    options = script_options(__doc__, "a fifth of the documents")
    wording = yaml.safe_load((HERE / "wording.yaml").read_text("utf-8"))
    packages = open_packages(HERE / "packages.yaml")
    tau2 = packages["inspect_evals"]
    korean = split_by_desk(portone_documents(packages["portone-mcp-server"], wording["desks"]))
    english = split_by_desk(bank_documents(tau2))
    routed_english = split_by_desk(bank_documents(tau2), ROUTED_HELD_OUT_EVERY)
    if options.quick:
        korean, english, routed_english = korean[::5], english[::5], routed_english[::5]
    draw = random.Random("routing")
    desks = list(wording["desks"])
    routed = [
        *document_requests(korean, desks, wording["ko"], "ko", PORTONE, draw),
        *document_requests(
            routed_english, list(DEPARTMENTS.values()), wording["en"], "en", BANK, draw
        ),
    ]
    train = [asked for asked, held_out in routed if not held_out]
    held_out = [asked for asked, held_out in routed if held_out]
    train += made_requests(
        wording["tools"], Slots(tau2, wording["slots"]), 4 if options.quick else 24
    )
    held_out += list(tau2_requests(tau2, wording["tools"]))
    draw.shuffle(train)
    write_task(options.out, "routing", *apart(train, held_out), LABELLED)

    draw = random.Random("policy")
    sides: dict[bool, list[Example]] = {False: [], True: []}
    for language, documents, credit in (("ko", korean, PORTONE), ("en", english, BANK)):
        templates = wording["questions"][language]
        other = wording["other_words"] if language == "en" else {}
        for document, asked in questions(documents, templates, other, language, credit, draw):
            sides[document.held_out].append(asked)
    draw.shuffle(sides[False])
    apart_sides = apart(sides[False], sides[True], question_alone, 0.9)
    write_task(options.out, "policy", *apart_sides, LABELLED)


def portone_documents(package: Package, desks: dict[str, list[str]]) -> list[HelpDocument]:
    """PortOne's help centre; the category is the desk, or nothing where no desk answers."""
    found = []
    for name in package.matching("*/resources/docs/help/*.md"):
        _, head, text = package.read(name).decode().split("---\n", 2)
        about = yaml.safe_load(head)
        category = str(about.get("category"))
        desk = next((d for d, words in desks.items() if any(w in category for w in words)), "")
        title = re.sub(r"\[[^\]]*\]\s*", "", str(about["title"])).strip()
        tags = [str(tag).strip() for tag in about.get("searchTags") or []]
        found.append(HelpDocument(name.split("/docs/")[1], title, desk, tags, _plain(text)))
    return found


def bank_documents(package: Package) -> list[HelpDocument]:
    """The bank's help documents for customers; those of its own staff are left out."""
    records = json.loads(
        gzip.decompress(package.read(DOMAINS + "banking_knowledge/documents.json.gz"))
    )
    found = []
    for record in sorted(records, key=lambda record: record["id"]):
        name = record["id"].removeprefix("doc_")
        desk = next((d for key, d in DEPARTMENTS.items() if name.startswith(key)), None)
        if desk and "internal" not in record["title"].lower():
            found.append(HelpDocument(name, record["title"], desk, [], record["content"]))
    return found


def split_by_desk(documents: list[HelpDocument], every: int = HELD_OUT_EVERY) -> list[HelpDocument]:
    """The documents with their side: of every desk one of ``every``, in the order of a draw."""
    by_desk: dict[str, list[HelpDocument]] = defaultdict(list)
    for document in documents:
        by_desk[document.category].append(document)
    sided = []
    for desk, members in sorted(by_desk.items()):
        random.Random(desk).shuffle(members)
        for number, document in enumerate(members):
            held_out = number % every == 2
            sided.append(HelpDocument(**{**document.__dict__, "held_out": held_out}))
    return sided


def document_requests(
    documents: list[HelpDocument],
    desks: list[str],
    sentences: list[str],
    language: Language,
    credit: dict[str, str],
    draw: random.Random,
) -> Iterator[tuple[Example, bool]]:
    """Requests that documents answer, with whether the document is held out."""
    said: dict[str, dict[str, HelpDocument]] = defaultdict(dict)
    for document in documents:
        for text in (document.title, *document.tags, *headed(document)):
            if 2 <= len(text) <= 80 and not re.search(r"업데이트$|보러가기|^\W*\d*\W*$", text):
                said[text].setdefault(document.name, document)
    instruction = (
        "문의를 담당 부서로 보내세요: " if language == "ko" else "Route the request to one of: "
    )
    for text, holders in sorted(said.items()):
        desk = {document.category for document in holders.values()}
        if len(desk) > 1 or "" in desk:  # several desks, or none, answer this
            continue
        made = draw.random() < 0.5 and not text.endswith(("?", "요"))
        yield (
            example(
                draw.choice(sentences).format(x=text) if made else text,
                desk.pop(),
                language=language,
                system=instruction + ", ".join(desks),
                choices=desks,
                group="help centre" if language == "ko" else "bank",
                synthetic=made,
                **credit,
            ),
            any(document.held_out for document in holders.values()),
        )


def headed(document: HelpDocument) -> Iterator[str]:
    """The document's title with its headings, as the subject of a request.

    Those of a document that tags lead to; of another, which only its title stands for, the last
    one, and none where it is measured: what is measured shall be of different documents.
    """
    headings = re.findall(r"^#{2,6} +(.+)$", document.text, re.M)
    if not document.tags:
        headings = [] if document.held_out else headings[-1:]
    for heading in headings[:12]:
        text = re.sub(r"^[\W\d]+|[^\w)?!%]+$", "", heading)
        if len(text) > 1 and text != document.title:
            yield f"{document.title} - {text}"


class Slots:
    """What made requests are filled with: real products, options and routes."""

    def __init__(self, tau2: Package, lists: dict[str, list[Any]]) -> None:
        shop = json.loads(gzip.decompress(tau2.read(DOMAINS + "retail/db.json.gz")))
        flights = json.loads(gzip.decompress(tau2.read(DOMAINS + "airline/db.json.gz")))
        self.lists = lists
        self.orders = sorted(shop["orders"])
        self.bookings = sorted(flights["reservations"])
        self.airports = sorted({flight["origin"] for flight in flights["flights"].values()})
        self.products = {
            product["name"].lower(): [
                variant["options"] for variant in product["variants"].values()
            ]
            for _, product in sorted(shop["products"].items())
        }

    def fill(self, template: str, draw: random.Random) -> str:
        """The template with everything in its place, as customer or as notes of the call."""
        values = {slot: draw.choice(choices) for slot, choices in self.lists.items()}
        product = draw.choice(list(self.products))
        key, value = draw.choice(list(draw.choice(self.products[product]).items()))
        values |= {
            "product": product,
            "option": draw.choice([str(value), f"{key} {value}"]),
            "order": draw.choice(self.orders),
            "booking": draw.choice(self.bookings),
            "route": " to ".join(draw.sample(self.airports, 2)),
        }
        notes = draw.random() < 0.6
        text = template.format(I="you" if notes else "I", my="your" if notes else "my", **values)
        text = re.sub(r"\bI are\b", "I am", text)
        return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), text)


def made_requests(
    tools: dict[str, dict[str, list[str]]], slots: Slots, each: int
) -> Iterator[Example]:
    """``each`` made requests for every tool of every company."""
    draw = random.Random("made requests")
    for company, templates in tools.items():
        for tool, sentences in templates.items():
            for _ in range(each):
                source = "Made from products and routes of tau2-bench (Sierra)"
                text = slots.fill(draw.choice(sentences), draw)
                yield _tool_request(text, tool, company, list(templates), source, synthetic=True)


def tau2_requests(tau2: Package, tools: dict[str, dict[str, list[str]]]) -> Iterator[Example]:
    """The requests of tau2-bench's tasks for which one tool alone changes something."""
    for company, domain in (("shop", "retail"), ("airline", "airline")):
        choices = list(tools[company])
        for task in json.loads(tau2.read(f"{DOMAINS}{domain}/tasks.json")):
            called = {call["name"] for call in task["evaluation_criteria"]["actions"] or []}
            called &= set(choices)
            reason = " ".join(task["user_scenario"]["instructions"]["reason_for_call"].split())
            if len(called) == 1:
                yield _tool_request(
                    reason, called.pop(), company, choices, **TASKS, synthetic=False
                )
    for task in json.loads(gzip.decompress(tau2.read(DOMAINS + "telecom/tasks.json.gz"))):
        match = re.match(r"\[(\w+)\]", task["id"])
        assert match
        texts = [task["user_scenario"]["instructions"]["reason_for_call"], task["ticket"]]
        for text in texts:
            choices = list(tools["telecom"])
            yield _tool_request(text, match[1], "telecom", choices, **TASKS, synthetic=False)


def _tool_request(
    text: str, tool: str, company: str, choices: list[str], source: str, *, synthetic: bool,
    license: str = "MIT",
) -> Example:  # fmt: skip
    return example(
        text,
        tool,
        language="en",
        system="Route the request to one of: " + ", ".join(choices),
        choices=choices,
        group=company,
        source=source,
        license=license,
        synthetic=synthetic,
    )


def questions(
    documents: list[HelpDocument],
    templates: dict[str, list[str]],
    other_words: dict[str, dict[str, list[str]]],
    language: Language,
    credit: dict[str, str],
    draw: random.Random,
) -> Iterator[tuple[HelpDocument, Example]]:
    """Questions about the points that documents list, a third of them about a passage without.

    Of documents to train on every point is asked for ``ASKED`` times.
    """
    asked_before: Counter[tuple[str, str]] = Counter()
    for document in documents:
        passages = list(split_passages(document.text))
        points = [list(listed_points(passage)) for passage in passages]
        for number, (passage, found) in enumerate(zip(passages, points, strict=True)):
            counts = Counter(point for point, _ in found)
            for point, value in found[:8] * (1 if document.held_out else ASKED):
                asked_before[point, value] += 1
                if counts[point] > 1 or asked_before[point, value] > 8:
                    continue
                if language == "ko" and not re.search("[가-힣]", point):  # a field of the API
                    continue
                others = [
                    other
                    for place, other in enumerate(passages)
                    if place != number and point.lower() not in other.lower() and value not in other
                ]
                refused = bool(others) and draw.random() < 0.33
                side = "held_out" if document.held_out and draw.random() < 0.5 else "train"
                named = point
                if other_words and draw.random() < OTHER_WORDS:
                    named = in_other_words(point, other_words[side], draw)
                asked = _filled(draw.choice(templates[side]), document.title, named)
                shown = draw.choice(others) if refused else passage
                answers = list(dict.fromkeys([*entries(shown), REFUSAL]))
                if len(answers) < 3:  # too little to choose from
                    continue
                if refused:
                    group = "not in the document"
                else:
                    group = "by its name" if named == point else "in other words"
                yield (
                    document,
                    example(
                        laid_out(document.title, shown, asked, language),
                        REFUSAL if refused else value,
                        language=language,
                        system=ANSWER[language],
                        choices=answers,
                        group=group,
                        synthetic=True,
                        **credit,
                    ),
                )


def in_other_words(point: str, known: dict[str, list[str]], draw: random.Random) -> str:
    """The point with every term that is ``known`` in other words; itself if there is none."""
    terms = "|".join(re.escape(term) for term in sorted(known, key=len, reverse=True))
    text, found = re.subn(
        rf"(?<!\w)(?:{terms})(?!\w)", lambda m: draw.choice(known[m[0]]), point.lower()
    )
    return text if found else point


def laid_out(title: str, passage: str, asked: str, language: Language) -> str:
    """The document's title, the passage and the question."""
    document, question = {"ko": ("문서", "질문"), "en": ("Document", "Question")}[language]
    return f"{document}: {title}\n{passage}\n\n{question}: {asked}"


def split_passages(text: str) -> Iterator[str]:
    """Runs of whole lines of at most ``PASSAGE`` characters, beginning at headings where it can."""
    passage = ""
    for line in (line.strip() for line in text.splitlines()):
        if not line or len(line) > PASSAGE:
            continue
        too_long = len(passage) + len(line) > PASSAGE
        if passage and (too_long or (line.startswith("#") and len(passage) > PASSAGE // 3)):
            yield passage
            passage = ""
        passage += ("\n" if passage else "") + line
    if len(passage) > 40:
        yield passage


def listed_points(passage: str) -> Iterator[tuple[str, str]]:
    """What a passage lists as point and value: ``- point: value``, or a table row of two."""
    lines = passage.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch(r"\|[\s:|-]+\|", following):  # the head of a table
            continue
        match = re.fullmatch(r"[-*] (.{2,45}?) ?[:：] ?(.{1,60})", line) or re.fullmatch(
            r"\| *([^|]{2,45}?) *\| *([^|]{1,60}?) *\|", line
        )
        if not match:
            continue
        point, value = (part.strip(" .*") for part in match.groups())
        dull = re.search(r"[-:]{3}|https?|[\[\]<>`{}]|^(If|When|Example)\b", line[2:])
        if (
            not dull
            and re.search(r"\w", value)
            and re.search(r"[^\W\d]{2}", point)
            and point != value
        ):
            yield point, value


def entries(passage: str) -> Iterator[str]:
    """What can be an answer: the values of a passage's points, and what else it lists."""
    values = dict(listed_points(passage))
    yield from values.values()
    for line in passage.splitlines():
        entry = re.fullmatch(rf"[-*\d.]+ (.{{2,{ENTRY}}})", line)
        text = entry[1].strip(" .*") if entry else ""
        if re.search(r"\w", text) and not any(text.startswith(point) for point in values):
            yield text


def question_alone(asked: Example) -> str:
    """The document's title and the question: by these questions are compared."""
    lines = asked.messages[-1].content.splitlines()
    return f"{lines[0]} {lines[-1]} {asked.answer}"


def _filled(template: str, title: str, point: str) -> str:
    """The template with the title and the point, and in Korean the particle that fits."""
    pairs = {"은": "는", "이": "가", "을": "를"}
    coda = "가" <= point[-1] <= "힣" and (ord(point[-1]) - 0xAC00) % 28
    particle = re.search(r"\{q:(.)\}", template)
    if particle:
        form = particle[1] if coda else pairs[particle[1]]
        template = template.replace(particle[0], "{q}" + form)
    if not re.match(r"[A-Z]{2}|[^A-Za-z]", point):
        point = point[0].lower() + point[1:]
    return template.replace("{q}", point).replace("{x}", title)


def _plain(markdown: str) -> str:
    """Markdown without its tags, bold marks and links' addresses."""
    text = re.sub(r"<[^>]*>|\\$", "", markdown, flags=re.M)
    text = re.sub(
        r"!?\[+([^\[\]]*)\]+\([^)]*\)", r"\1", text.replace("**", "").replace("\xa0", " ")
    )
    return re.sub(r"\\([()_.\[\]&~*+-])", r"\1", text)


if __name__ == "__main__":
    main()
