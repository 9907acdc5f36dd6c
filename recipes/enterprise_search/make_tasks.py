"""python recipes/enterprise_search/make_tasks.py --out runs/enterprise_search/tasks [--quick]

Two tasks of a search over a company's documents, ``relevance`` and ``bank_relevance`` (ranking):
does this passage answer this query? The queries and their answers are real: the keywords of
LibreOffice's help index and the pages that they lead to (Korean and English), the search tags of
PortOne's Korean documents; and, for the second task, which is held out only, what customers say
first in tau2-bench's bank tasks and the documents that these need.

A lexical search (`seodang.lexical_search`) finds the candidates. Of a held-out query they are what
it finds, best first, so its own ranking is the order of the lines. ``TASK.first-stage.jsonl`` has
its scores, those with the titles weighed (``search_scores``), and also the queries that it found no
answer to: no ranking can mend those, and they are not in the task. Of a training query the right
page is there even if the search misses it, beside some wrong ones. Every other pair keeps its
label; the rest are requests, for the teacher to judge. ``relevance.validation.jsonl``, made like
the held-out side, is neither trained on nor reported: `benchmarks/fusion.py` weighs the search on
it. No page answers queries of two sides.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from selectolax.lexbor import LexborHTMLParser

from seodang.corpus.task_writing import (
    example,
    open_packages,
    script_options,
    write_lines,
    write_task,
)
from seodang.corpus.tasks import Example
from seodang.lexical_search import LexicalIndex, best_window, letter_pairs
from seodang.packages import Package
from seodang.recipe import Language

HERE = Path(__file__).parent
HELP = "usr/share/libreoffice/help/"
BANK = "inspect_evals/tau2/data/domains/banking_knowledge/"
DEPTH = 20  # candidates of a query
TITLE = 0.5  # weight of the title's own score; best on training queries (benchmarks/lexical.py)
WRONG = 3  # of them, that a training query is shown beside its answers
LABELLED = 2  # of so many pairs one keeps its answer; the others wait for the teacher's
SHOWN = {"ko": 60, "en": 100}  # characters of a passage that a model reads
INDEXED = 4000  # characters of a page that the lexical search reads
ASKED = {
    "ko": ("이 문서가 검색어에 맞는 답인가요?", ["예", "아니요"]),
    "en": ("Does the passage answer the query?", ["yes", "no"]),
}


@dataclass
class Collection:
    """Documents of one origin: their titles and texts, and the queries that lead to them."""

    name: str
    language: Language
    source: str
    license: str
    pages: dict[str, tuple[str, str]] = field(default_factory=dict)
    answers: dict[str, set[str]] = field(default_factory=dict)


def main() -> None:
    """Write the tasks, and what the lexical search made of their held-out sides."""
    options = script_options(__doc__, "an eighth of it all")
    share = 8 if options.quick else 1
    packages = open_packages(HERE / "packages.yaml")
    tasks = {
        "relevance": learned_collections(packages),
        "bank_relevance": [(bank(packages["inspect_evals"]), 0, 90)],
    }
    for name, collections in tasks.items():
        train: list[Example] = []
        measured: dict[str, Ranked] = {"held-out": Ranked(), "validation": Ranked()}
        for collection, of_train, of_held_out in collections:
            if options.quick:
                thin_out(collection, share)
            search = Search(collection)
            sides = split_queries(collection, of_train // share, of_held_out // share)
            draw = random.Random(collection.name)
            known = set().union(*(collection.answers[query] for query in sides["train"]))
            for query in sides["train"]:
                train += training_list(search, query, known, draw)
            for side, ranked in measured.items():
                for query in sides[side]:
                    ranked.add(search, query)
        write_task(options.out, name, train, measured["held-out"].pairs, LABELLED)
        write_lines(options.out / f"{name}.first-stage.jsonl", measured["held-out"].rankings)
        if (ranked := measured["validation"]).rankings:
            write_lines(options.out / f"{name}.validation.first-stage.jsonl", ranked.rankings)
            pairs = [pair.model_dump(exclude_none=True) for pair in ranked.pairs]
            write_lines(options.out / f"{name}.validation.jsonl", pairs)


def learned_collections(packages: Mapping[str, Package]) -> list[tuple[Collection, int, int]]:
    """What is trained on, with the number of queries to train on and to hold out."""
    return [
        (libreoffice(packages["libreoffice-help-ko"], "ko"), 1300, 150),
        (portone(packages["portone-mcp-server"]), 700, 110),
        (libreoffice(packages["libreoffice-help-en-us"], "en"), 2000, 250),
    ]


def libreoffice(package: Package, language: Language) -> Collection:
    """The help pages of LibreOffice that its index of keywords leads to."""
    folder = {"ko": "ko", "en": "en-US"}[language]
    collection = Collection(
        f"LibreOffice help ({language})",
        language,
        "LibreOffice 7.4 help (The Document Foundation), Debian 4:7.4.7-1+deb12u14",
        "MPL-2.0",
    )
    marks = package.read(f"{HELP}{folder}/bookmarks.js").decode()
    leads: dict[str, set[str]] = defaultdict(set)
    for page, text in re.findall(r'\{url:"([^"?#]+)[^"]*", app:"\w+", text:"([^"]+)"\}', marks):
        keyword = " ".join(text.replace("--", " ").split())
        if len(keyword) > 3 and (language == "en" or re.search("[가-힣]{2}", keyword)):
            leads[keyword].add(page)
    for page in sorted(set().union(*leads.values())):
        if HELP + page not in package.sizes:
            continue
        html = LexborHTMLParser(package.read(HELP + page).decode())
        title, body = html.css_first("title"), html.css_first("#DisplayArea")
        assert title
        assert body
        heading = " ".join(title.text().split())
        text = " ".join(body.text(separator=" ").split()).removeprefix(heading).strip()
        hangul = len(re.findall("[가-힣]", text))
        if len(text) > 60 and (language == "en" or hangul > 0.3 * len(text)):
            collection.pages[page] = heading, text
    _keep_answers(collection, leads)
    return collection


def portone(package: Package) -> Collection:
    """PortOne's help centre, found by the search tags that its documents carry."""
    collection = Collection(
        "PortOne help", "ko", "PortOne documentation, portone-mcp-server 0.12.1", "Apache-2.0"
    )
    leads: dict[str, set[str]] = defaultdict(set)
    for name in package.matching("*/resources/docs/help/*.md"):
        _, head, text = package.read(name).decode().split("---\n", 2)
        about = yaml.safe_load(head)
        page = name.split("/docs/")[1]
        text = re.sub(r"<[^>]*>|\]\([^)]*\)|[#*\\>\[\]|]", " ", text)
        collection.pages[page] = str(about["title"]), " ".join(text.split())
        for tag in about.get("searchTags") or []:
            if len(str(tag).strip()) > 1:
                leads[" ".join(str(tag).split())].add(page)
    # What leads to many documents, such as "update", is no question.
    _keep_answers(collection, {tag: pages for tag, pages in leads.items() if len(pages) <= 3})
    return collection


def bank(package: Package) -> Collection:
    """The bank's documents; what a customer says first, with the documents that the task needs."""
    collection = Collection(
        "tau2 bank", "en", "tau2-bench banking_knowledge (Sierra), inspect_evals 0.26.0", "MIT"
    )
    for record in json.loads(gzip.decompress(package.read(BANK + "documents.json.gz"))):
        text = " ".join(re.sub(r"[#*|]|-{3,}", " ", record["content"]).split())
        collection.pages[record["id"]] = record["title"], text
    leads: dict[str, set[str]] = defaultdict(set)
    for task in json.loads(package.read(BANK + "tasks.json")):
        script = task["user_scenario"]["instructions"]
        opening = re.search(r'[Ss]tart[^"\n]{0,60}"([^"\n]{40,})"', script)
        situation = re.search(r"\*\*Your (?:situation|goal)[^*]*\*\*\s*(.+)", script)
        wish = re.search(
            r"(You(?:'re| are| want)? (?:looking|planning|to|received|have).+)", script
        )
        if said := opening or situation or wish:
            leads[" ".join(said[1].split())[:300]] |= set(task["required_documents"])
    _keep_answers(collection, leads)
    return collection


def _keep_answers(collection: Collection, leads: dict[str, set[str]]) -> None:
    """The queries that lead to pages of the collection."""
    for query, pages in sorted(leads.items()):
        if there := pages & collection.pages.keys():
            collection.answers[query] = there


def thin_out(collection: Collection, share: int) -> None:
    """Leave every ``share``-th page, and the queries that lead to those alone."""
    collection.pages = dict(list(collection.pages.items())[::share])
    leads, collection.answers = collection.answers, {}
    _keep_answers(collection, leads)


def split_queries(collection: Collection, of_train: int, of_held_out: int) -> dict[str, list[str]]:
    """Queries to train on, to measure, and as many to choose by; those measured resemble no others.

    No page answers queries of two sides.
    """
    draw = random.Random(collection.name)
    pages = sorted(collection.pages)
    aside = set(draw.sample(pages, len(pages) // 4 if of_train else len(pages)))
    learned, measured = [], []
    for query in draw.sample(sorted(collection.answers), len(collection.answers)):
        answers = collection.answers[query]
        if answers <= aside:
            measured.append(query)
        elif not answers & aside:
            learned.append(query)
    measured, rest = measured[:of_held_out], measured[of_held_out:]
    answering = set().union(*(collection.answers[query] for query in measured))
    likened = [letter_pairs(query) for query in measured]

    def of_its_own(query: str) -> bool:
        return not any(_alike(letter_pairs(query), other) for other in likened)

    others = [query for query in rest if not collection.answers[query] & answering]
    return {
        "train": [query for query in learned if of_its_own(query)][:of_train],
        "held-out": measured,
        "validation": [query for query in others if of_its_own(query)][:of_held_out],
    }


def _alike(one: set[str], other: set[str]) -> bool:
    """Whether two queries share more than two thirds of their pairs of letters (Jaccard)."""
    return 3 * len(one & other) > 2 * len(one | other)


class Hit(NamedTuple):
    """A page for a query: its BM25 score, and what the search knows of the page and its title."""

    page: str
    score: float
    with_title: float  # the title's own score added
    places: tuple[int, int]  # among the pages and among the titles
    of_best: tuple[float, float]  # its score and its title's, as shares of the best


class Search:
    """A lexical search over a collection's pages, and over their titles alone."""

    def __init__(self, collection: Collection) -> None:
        pages = collection.pages.items()
        texts = {page: f"{title}\n{text[:INDEXED]}" for page, (title, text) in pages}
        titles = {page: title for page, (title, _) in pages}
        self.collection = collection
        self._texts = LexicalIndex(texts, collection.language)
        self._titles = LexicalIndex(titles, collection.language)

    def scores(self, query: str) -> tuple[dict[str, float], dict[str, float]]:
        """BM25 scores of the pages that are found, and of the titles, best first."""
        number = len(self.collection.pages)
        return dict(self._texts.search(query, number)), dict(self._titles.search(query, number))

    def hits(self, query: str, needed: set[str] | None = None) -> list[Hit]:
        """What is found, best first, and the pages ``needed`` that are not found, last."""
        number = len(self.collection.pages)
        pages, titles = self.scores(query)
        pages |= dict.fromkeys(sorted((needed or set()) - pages.keys()), 0.0)
        best, best_title = (max(found.values(), default=0) or 1 for found in (pages, titles))
        title_places = {page: place for place, page in enumerate(titles, 1)}
        return [
            Hit(
                page,
                score,
                score + TITLE * titles.get(page, 0.0),
                (place, title_places.get(page, number)),
                (score / best, titles.get(page, 0.0) / best_title),
            )
            for place, (page, score) in enumerate(pages.items(), 1)
        ]


def training_list(
    search: Search, query: str, known: set[str], draw: random.Random
) -> Iterator[Example]:
    """The query's pages, and some of those that the search takes for right.

    Wrong are only pages ``known`` to be right for another query: of the others a model would learn
    that they are always wrong, and these are what it is measured on. The better the search likes
    a wrong page, the likelier it is drawn (in inverse proportion to its place): what the search
    itself tells apart, a model that is used with it need not learn.
    """
    answers = search.collection.answers[query]
    hits = search.hits(query, answers)
    right = [hit for hit in hits if hit.page in answers][:3]
    wrong = [hit for hit in hits[:DEPTH] if hit.page in known - answers]
    wrong.sort(key=lambda hit: -hit.with_title)
    # Weighted sampling without replacement (Efraimidis and Spirakis 2006), of weights 1 / place.
    keys = {hit.page: draw.random() ** place for place, hit in enumerate(wrong, 1)}
    listed = right + sorted(wrong, key=lambda hit: -keys[hit.page])[:WRONG]
    draw.shuffle(listed)
    for hit in listed:
        yield _pair(search.collection, query, hit)


@dataclass
class Ranked:
    """Pairs to rank, and what the lexical search made of them."""

    pairs: list[Example] = field(default_factory=list)
    rankings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, search: Search, query: str) -> None:
        """Add what the search finds, best first (no pairs, if no answer is there)."""
        collection, hits = search.collection, search.hits(query)[:DEPTH]
        pairs = [_pair(collection, query, hit) for hit in hits]
        if any(pair.relevance for pair in pairs):
            self.pairs += pairs
        ranking = {
            "group": _group(collection, query),
            "language": collection.language,
            "relevant": len(collection.answers[query]),
            "ids": [pair.id for pair in pairs],
            "scores": [round(hit.score, 4) for hit in hits],
            "search_scores": [round(hit.with_title, 4) for hit in hits],
            "relevance": [pair.relevance for pair in pairs],
        }
        self.rankings.append(ranking)


def _group(collection: Collection, query: str) -> str:
    return f"{collection.name}: {query}"


def _pair(collection: Collection, query: str, hit: Hit) -> Example:
    """A query and a passage: the page's title and the part that has most of the query.

    The last line says what the search knows of it, as Askari et al. (2023, "Injecting the BM25
    Score as Text Improves BERT-Based Re-rankers") do, in digits that stand at fixed places: the
    place of the page and of its title (0 from the tenth on); in tenths, at most 9, the scores of
    both as shares of the best, how much of the query is in the title and the passage, and of the
    title in the query; and the length of the page, in doublings of 100 characters.
    """
    title, text = collection.pages[hit.page]
    question, choices = ASKED[collection.language]
    labels = {"ko": ("검색어", "문서", "일치"), "en": ("Query", "Passage", "Match")}
    asked, passage, match = labels[collection.language]
    shown = best_window(text[:INDEXED], query, SHOWN[collection.language])
    wanted, named = letter_pairs(query), letter_pairs(title)
    shares = (
        *hit.of_best,
        len(wanted & named) / max(1, len(wanted)),
        len(wanted & letter_pairs(shown)) / max(1, len(wanted)),
        len(wanted & named) / max(1, len(named)),
    )
    digits = [place if place < 10 else 0 for place in hit.places]
    digits += [int(min(9, 10 * share)) for share in shares]
    digits.append(int(min(9, math.log2(1 + len(text) / 100))))
    told = "".join(map(str, digits))
    relevant = hit.page in collection.answers[query]
    return example(
        f"{asked}: {query}\n{passage}: {title}. {shown}\n{match}: {told}",
        choices[0] if relevant else choices[1],
        language=collection.language,
        system=question,
        choices=choices,
        group=_group(collection, query),
        relevance=int(relevant),
        source=collection.source,
        license=collection.license,
        synthetic=False,
    )


if __name__ == "__main__":
    main()
