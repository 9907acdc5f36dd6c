"""Labels in and out of a store: the same numbers at the same tokens, or a refusal."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.causal_lm import CausalLM
from seodang.corpus.documents import Document
from seodang.corpus.sequences import TokenSequence, tokenize
from seodang.errors import InputError
from seodang.softlabels import SoftLabelStore
from seodang.softlabels import open as open_store
from seodang.softlabels.exchange import import_labels
from seodang.softlabels.export import export
from seodang.softlabels.from_axolotl import read as read_axolotl
from seodang.softlabels.from_distilabel import read as read_distilabel
from seodang.softlabels.imported import ImportedSequence, Labelled, Survey
from seodang.softlabels.shards import ENTROPY_STEP, HEAD_MASS_STEP
from seodang.softlabels.spelling import Spelling
from tiny import tiny_teacher, tiny_tokenizer
from tiny_labels import make_store, run_labels

Run = Callable[..., tuple[int, str, str]]
Rows = list[tuple[list[int], list[float]]]
TOKENIZER = tiny_tokenizer()
K = 12

# Synthetic: written for these tests.
CHAT = [
    {"role": "user", "content": "카드를 잃어버렸어요. What now?"},
    {"role": "assistant", "content": "앱에서 바로 정지할 수 있습니다."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "A new card arrives in a week."},
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return run_labels(capsys)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("exchange") / "teacher")


@pytest.fixture(scope="module")
def folder(teacher: Path) -> Path:
    """The folder of the teacher, with stores of a few documents."""
    documents = [{"id": f"d{n}", "text": "Your monthly payment. " * n} for n in range(1, 6)]
    documents.append({"id": "chat", "messages": CHAT})
    for layout in ("fast", "small"):
        options = ("--estimator", "head-tail", "--layout", layout)
        make_store(teacher.parent, layout, *options, documents=documents)
    make_store(teacher.parent, "residual", "--estimator", "residual", documents=documents)
    return teacher.parent


def load(path: Path, teacher: Path, out: Path, form: str = "axolotl", **options: Any) -> Any:
    import_labels(path, form, teacher, "synthetic teacher", "CC0-1.0", out, **options)
    return open_store(out)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as Parquet or JSONL, as the extension says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def window(messages: list[dict[str, str]]) -> TokenSequence:
    (found,) = tokenize(Document("d", "s", "CC0-1.0", "o", messages=messages), TOKENIZER, 9999)
    return found


def scored(teacher: Path, token_ids: np.ndarray) -> np.ndarray:
    """The teacher's log-probabilities, (tokens, vocabulary): row t is of the token after t."""
    model = CausalLM.load(teacher)
    (hidden_TH,) = model.hidden_states([token_ids])
    with torch.inference_mode():
        found: np.ndarray = model.log_probs(hidden_TH).numpy()
    return found


def of_each_token(log_probs_TV: np.ndarray, token_ids: np.ndarray, k: int = K) -> Rows:
    """Row r is of token r + 1: the k best ids, and the token that came if it is none of them."""
    rows: Rows = []
    for position, came in enumerate(token_ids[1:].tolist()):
        best = np.argsort(-log_probs_TV[position], kind="stable")[:k].tolist()
        ids = best if came in best else [*best, came]
        rows.append((ids, log_probs_TV[position][ids].astype(float).tolist()))
    return rows


def dictionaries(rows: Rows) -> list[Any]:
    """Rows as vLLM's server and axolotl write them."""
    return [
        [{"token": f"token_id:{i}", "logprob": p} for i, p in zip(ids, values, strict=True)]
        for ids, values in rows
    ]


def entries(store: SoftLabelStore, number: int, position: int) -> dict[int, float]:
    sequence = store[number]
    part = slice(sequence.offsets[position], sequence.offsets[position + 1])
    return dict(zip(sequence.ids[part].tolist(), sequence.weights[part].tolist(), strict=True))


def nearest_level(store: SoftLabelStore, weight: float) -> float:
    """What the store keeps of a weight."""
    levels = store.header.levels()
    return float(np.float32(levels[np.abs(levels - weight).argmin()]))


# --- export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fast", "small"])
def test_export_holds_the_numbers_of_the_store(folder: Path, tmp_path: Path, layout: str) -> None:
    store = open_store(folder / layout)
    out = tmp_path / "lists.parquet"
    export(store, out)
    frame = pd.read_parquet(out)
    rows = duckdb.sql(f"SELECT ids, weights FROM '{out}'").fetchall()
    assert len(frame) == len(rows) == len(store)
    for sequence, row, (ids, weights) in zip(store, frame.itertuples(), rows, strict=True):
        assert row.document_id == sequence.document_id
        for name in ("token_ids", "labelled", "entropy", "head_mass"):
            assert np.array_equal(getattr(row, name), getattr(sequence, name))
        assert len(ids) == len(weights) == len(sequence.labelled)
        for index, position in enumerate(sequence.labelled.tolist()):
            part = slice(sequence.offsets[position], sequence.offsets[position + 1])
            assert ids[index] == row.ids[index].tolist() == sequence.ids[part].tolist()
            assert np.array_equal(row.weights[index], sequence.weights[part])
            assert np.array_equal(np.float32(weights[index]), sequence.weights[part])
    schema = pq.read_schema(out)
    assert schema.field("ids").type == pa.list_(pa.list_(pa.int32()))
    assert json.loads(schema.metadata[b"seodang"])["estimator"] == "head-tail"
    assert [file.name for file in tmp_path.iterdir()] == ["lists.parquet"]


def test_export_is_written_group_by_group(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(folder / "fast")
    export(store, tmp_path / "one.parquet")
    monkeypatch.setattr("seodang.softlabels.export.GROUP_ENTRIES", 200)
    export(store, tmp_path / "many.parquet")
    groups = [pq.read_metadata(tmp_path / f"{n}.parquet").num_row_groups for n in ("one", "many")]
    assert groups[0] == 1 < groups[1]
    one, many = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("one", "many"))
    assert one.equals(many)


def test_an_export_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder / "fast", tmp_path / "damaged"))
    shard = damaged / "labels-00000.parquet"
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 4, len(data) // 2, 7):
        data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="labels-00000"):
        export(open_store(damaged), tmp_path / "lists.parquet")
    assert list(tmp_path.iterdir()) == [damaged]


def test_export_command(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", folder / "fast", "--out", tmp_path / "x.parquet", "--json")
    assert code == 0
    assert json.loads(out)["sequences"] == len(pd.read_parquet(tmp_path / "x.parquet"))
    for place, message in (
        (folder / "fast" / "x.parquet", "inside of the store"),
        (tmp_path, "is a directory"),
        (tmp_path / "gone" / "x.parquet", "no such directory"),
    ):
        code, _, err = run("export", folder / "fast", "--out", place)
        assert code == 2
        assert message in err
    assert open_store(folder / "fast").verify() == []


# --- axolotl ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["dictionaries", "lists"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_axolotl_input_columns(teacher: Path, tmp_path: Path, columns: str, suffix: str) -> None:
    sequence = window(CHAT)
    log_probs_TV = scored(teacher, sequence.token_ids)
    rows = of_each_token(log_probs_TV, sequence.token_ids)
    if columns == "lists":
        row = {"logprobs": [p for _, p in rows], "target_token_ids": [ids for ids, _ in rows]}
    else:
        row = {"llm_text_generation_vllm_logprobs": dictionaries(rows)}
    file = write(tmp_path / f"data{suffix}", [{"id": "chat", "messages_combined": CHAT, **row}])
    store = load(file, teacher, tmp_path / "out")
    assert store.verify() == []
    (found,) = store
    assert found.document_id == "chat"
    assert np.array_equal(found.token_ids, sequence.token_ids)
    last = len(sequence.token_ids) - 1
    assert found.labelled.tolist() == [p for p in sequence.labelled.tolist() if p < last]
    for index, position in enumerate(found.labelled.tolist()):
        ids, values = rows[position]
        p = np.exp(values)
        expected = {i: nearest_level(store, w) for i, w in zip(ids, p, strict=True)}
        assert entries(store, 0, position) == expected
        rest = 1 - p.sum()
        bound = -(p * np.log(p)).sum() - rest * math.log(rest)
        assert found.entropy[index] == pytest.approx(bound, abs=0.51 * ENTROPY_STEP)
        assert found.head_mass[index] == pytest.approx(p.sum(), abs=0.51 * HEAD_MASS_STEP)
    header = store.header
    assert (header.estimator, header.parameters) == ("residual", {"k": K + 1})
    assert header.teacher.startswith("imported:")
    assert header.vocab_size == len(TOKENIZER)


def test_a_store_goes_to_axolotl_and_back(folder: Path, tmp_path: Path) -> None:
    """Weights come back to the level they were on, or the next where a sum had to be scaled."""
    teacher, store = folder / "teacher", open_store(folder / "residual")
    number = next(i for i, s in enumerate(store) if s.document_id == "chat")
    sequence = store[number]
    rows: list[Any] = [None] * (len(sequence.token_ids) - 1)
    for position in sequence.labelled.tolist():
        if position < len(rows):
            kept = {i: w for i, w in entries(store, number, position).items() if w > 0}
            scale = max(1.0, sum(kept.values()))
            rows[position] = [
                {"token": f"token_id:{i}", "logprob": math.log(w / scale)} for i, w in kept.items()
            ]
    file = write(tmp_path / "data.parquet", [{"messages": CHAT, "logprobs": rows}])
    back = load(file, teacher, tmp_path / "out")
    assert np.array_equal(back[0].token_ids, sequence.token_ids)
    levels = back.header.levels()
    for position in back[0].labelled.tolist():
        before, after = entries(store, number, position), entries(back, 0, position)
        assert after.keys() == {i for i, w in before.items() if w > 0}
        for token, weight in after.items():
            codes = [int(np.abs(levels - w).argmin()) for w in (before[token], weight)]
            assert abs(codes[0] - codes[1]) <= 1


def test_axolotl_rows_may_cover_only_the_end(teacher: Path, tmp_path: Path) -> None:
    sequence = window(CHAT)
    rows = of_each_token(scored(teacher, sequence.token_ids), sequence.token_ids)
    part = dictionaries(rows)[-6:]
    part[2] = None
    store = load(
        write(tmp_path / "d.jsonl", [{"messages": CHAT, "logprobs": part}]), teacher, tmp_path / "o"
    )
    first = len(sequence.token_ids) - 7
    wanted = {first + i for i in range(6) if i != 2} & set(sequence.labelled.tolist())
    assert set(store[0].labelled.tolist()) == wanted
    for position in wanted:
        assert entries(store, 0, position).keys() == set(rows[position][0])


def prepared(
    token_ids: list[int], labels: list[int], rows: dict[int, list[float]], shift: int, k: int = 3
) -> dict[str, Any]:
    """Axolotl's prepared columns.

    ``rows`` holds, for a token, log-probabilities whose ids count up from the token's index: its
    own distribution. ``shift`` 1 is the layout up to 0.21.0, 0 that of commit 139786bf.
    """
    row: dict[str, Any] = {"input_ids": token_ids, "labels": labels}
    row |= {"target_token_ids": [], "target_logprobs": [], "target_mask": []}
    for index in range(len(token_ids)):
        token = index if shift else index + 1
        values = rows.get(token)
        if values is None:
            row["target_token_ids"].append(list(range(k)))
            row["target_logprobs"].append([-1e9] * k)
            row["target_mask"].append([0] * k)
        else:
            row["target_token_ids"].append([token + i for i in range(k)])
            row["target_logprobs"].append(values)
            row["target_mask"].append([int(labels[token] != -100)] * k)
    return row


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_prepared_rows_are_never_taken_for_a_neighbours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is trained and however far the rows reach, the layout is told by the masks."""
    length = data.draw(st.integers(2, 24))
    trained = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    begin = data.draw(st.integers(0, length - 1))  # rows reach from here to the end
    shift = data.draw(st.sampled_from([0, 1]))
    labels = [7 if yes else -100 for yes in trained]
    rows = {token: [math.log(0.5), math.log(0.3), math.log(0.2)] for token in range(begin, length)}
    file = tmp_path_factory.mktemp("prepared") / "data.jsonl"
    write(file, [prepared(list(range(length)), labels, rows, shift)])
    found = [label for sequence in read_axolotl(file, TOKENIZER) for label in sequence.labels]
    wanted = [t for t in rows if trained[t] and t > 0]  # nothing stands before the first token
    assert [label.ids[0] for label in found] == wanted
    for label in found:
        assert label.ids[0] == label.position + 1  # the distribution of the token after it


@pytest.mark.parametrize("shift", [0, 1])
def test_prepared_columns_are_renormalised_and_say_so(
    teacher: Path, tmp_path: Path, shift: int
) -> None:
    tokens = list(range(40, 60))
    p = [0.6, 0.3, 0.1]
    rows = {token: np.log(p).tolist() for token in range(1, 20)}
    row = prepared(tokens, [-100] * 5 + tokens[5:], rows, shift)
    file = write(tmp_path / "prepared.parquet", [row])
    store = load(file, teacher, tmp_path / "out")
    assert (store.estimator, store.header.parameters) == ("top-k", {"k": 3})
    assert store[0].labelled.tolist() == list(range(4, 19))
    assert entries(store, 0, 9) == {10 + i: nearest_level(store, w) for i, w in enumerate(p)}
    assert "renormalised" in (tmp_path / "out" / "README.md").read_text()


def test_a_temperature_is_undone_where_it_can_be(run: Run, teacher: Path, tmp_path: Path) -> None:
    p = np.array([0.6, 0.3, 0.1])
    hot = p ** (1 / 2)
    rows = {token: np.log(hot / hot.sum()).tolist() for token in range(1, 9)}
    tokens = list(range(9))
    file = write(tmp_path / "hot.jsonl", [prepared(tokens, tokens, rows, 0)])
    store = load(file, teacher, tmp_path / "out", temperature=2.0)
    assert entries(store, 0, 3) == {4 + i: nearest_level(store, w) for i, w in enumerate(p)}
    part = {token: [math.log(0.5), math.log(0.2), math.log(0.1)] for token in range(1, 9)}
    file = write(tmp_path / "part.jsonl", [prepared(tokens, tokens, part, 0)])
    options = ["--tokenizer", teacher, "--teacher", "t", "--license", "MIT", "--format", "axolotl"]
    code, _, err = run("import", file, *options, "--out", tmp_path / "no", "--temperature", "2")
    assert code == 2
    assert "cannot be brought to temperature 1" in err
    assert not (tmp_path / "no").exists()


GOOD = {"token": "token_id:5", "logprob": -0.5}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not finite": ({"logprob": float("-inf")}, "not a finite number"),
    "not a number": ({"logprob": "much"}, "'much' is no log-probability"),
    "null": ({"logprob": None}, "None is no log-probability"),
    "above one": ({"logprob": 0.2}, "sum to 1.2214"),
    "outside": ({"token": "token_id:600"}, "id 600 is outside of the vocabulary of 600"),
    "a word": ({"token": " card"}, "is no `token_id:NUMBER`"),
    "no logprob": ({"token": "token_id:5", "logprob": ...}, 'wants {"token": "token_id:123"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_entries_are_refused(teacher: Path, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    entry = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    rows = [[entry], [GOOD]]  # of the mark that ends the turn, and of the line end after it
    file = write(tmp_path / "bad.jsonl", [{"messages": CHAT, "logprobs": rows}])
    with pytest.raises(InputError, match=r"bad.jsonl:1") as refused:
        load(file, teacher, tmp_path / "out")
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


def chat_rows(count: int) -> list[Any]:
    return [[GOOD]] * count


FILES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "more rows than tokens": ([{"messages": CHAT, "logprobs": chat_rows(500)}], "has 500 rows"),
    "twice the same id": (
        [{"messages": CHAT, "logprobs": [[GOOD, {**GOOD, "logprob": -3.0}]] * 3}],
        "stands there twice",
    ),
    "no logprobs": ([{"messages": CHAT}], "one column whose name ends in `logprobs`"),
    "two of them": (
        [{"messages": CHAT, "a_logprobs": chat_rows(1), "b_logprobs": chat_rows(1)}],
        "one column whose name ends in `logprobs`",
    ),
    "no messages": ([{"text": "x", "logprobs": chat_rows(1)}], "one column of messages"),
    "nothing of the assistant": (
        [{"messages": CHAT[:1], "logprobs": chat_rows(1)}],
        "no assistant's turn",
    ),
    "uneven lists": (
        [{"messages": CHAT, "logprobs": [[-1.0, -2.0]] * 2, "target_token_ids": [[1]] * 2}],
        "1 ids and 2 log-probabilities",
    ),
    "uneven rows": (
        [{"messages": CHAT, "logprobs": [[-1.0]] * 2, "target_token_ids": [[1]]}],
        "has 1 rows",
    ),
    "prepared without labels": (
        [{"input_ids": [1], "target_logprobs": [[-1.0]], "target_token_ids": [[1]]}],
        "no column labels, target_mask",
    ),
    "prepared of unequal length": (
        [prepared([1, 2, 3], [1, 2, 3], {}, 0) | {"input_ids": [1, 2]}],
        "columns of unequal length: input_ids 2",
    ),
    "masks that fit no layout": (
        [prepared([1, 2, 3, 4], [-100, -100, 3, 4], {}, 0) | {"target_mask": [[1] * 3] * 4}],
        "fits neither",
    ),
    "two layouts": (
        [
            prepared(
                list(range(9)), [-100, *range(1, 9)], {t: [-1, -2, -3] for t in range(1, 9)}, s
            )
            for s in (0, 1)
        ],
        "mixes two versions of axolotl",
    ),
    "nothing labelled": ([prepared([1, 2], [-100, -100], {}, 0)], "no row has a labelled token"),
    "a list": ([[1, 2]], "must be an object"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused(teacher: Path, tmp_path: Path, case: str) -> None:
    rows, message = FILES[case]
    file = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError) as refused:
        load(file, teacher, tmp_path / "out")
    assert message in str(refused.value)
    assert "bad.jsonl" in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_bad_last_row_leaves_nothing_and_what_was_there_alone(
    teacher: Path, tmp_path: Path
) -> None:
    good = {"messages": CHAT, "logprobs": chat_rows(5)}
    file = write(tmp_path / "good.jsonl", [good])
    before = load(file, teacher, tmp_path / "out").artifact.digest
    bad = {"messages": CHAT, "logprobs": [[{**GOOD, "logprob": 1.0}], [GOOD]]}
    other = write(tmp_path / "bad.jsonl", [good] * 3 + [bad])
    with pytest.raises(InputError, match=r"bad.jsonl:4"):
        load(other, teacher, tmp_path / "out")
    assert open_store(tmp_path / "out").artifact.digest == before
    assert open_store(tmp_path / "out").verify() == []


@pytest.mark.parametrize("name", ["data.csv", "gone.parquet", "gone.jsonl", "text.parquet"])
def test_unreadable_files_are_refused(teacher: Path, tmp_path: Path, name: str) -> None:
    if not name.startswith("gone"):
        (tmp_path / name).write_text("a,b\n")
    with pytest.raises(InputError, match=name):
        load(tmp_path / name, teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([-1, 0, 1]), st.integers(0, 2**32 - 1))
def test_shifted_rows_are_found_by_the_tokens_that_came(shift: int, seed: int) -> None:
    """A teacher that gives most of its mass to what comes: the wrong neighbour stands out."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 600, 120).tolist()
    labels = []
    for position in range(2, 110):
        others = (np.arange(5) * 97 + rng.integers(0, 90)).tolist()
        came = tokens[position + 1 + shift]
        held = [came, *(i for i in others if i != came)] if rng.random() < 0.8 else others
        labels.append(Labelled(position, held, [-2.0] * len(held)))
    survey = Survey(600)
    survey.add(ImportedSequence("file", "d", tokens, labels))
    if shift:
        with pytest.raises(InputError, match="shifted by one"):
            survey.check_alignment(Path("file"))
    else:
        survey.check_alignment(Path("file"))


def test_a_file_shifted_by_one_is_refused(teacher: Path, tmp_path: Path) -> None:
    sequence = window(CHAT)
    rows: Rows = [([int(token), 3], [-0.1, -5.0]) for token in sequence.token_ids[1:]]
    rows = [(ids if ids[0] != 3 else [3, 4], p) for ids, p in rows]
    good = dictionaries(rows)
    load(
        write(tmp_path / "g.jsonl", [{"messages": CHAT, "logprobs": good}] * 5),
        teacher,
        tmp_path / "g",
    )
    bad = [*good[1:], good[0]]
    file = write(tmp_path / "b.jsonl", [{"messages": CHAT, "logprobs": bad}] * 5)
    with pytest.raises(InputError, match="token after the one that they are for"):
        load(file, teacher, tmp_path / "b")
    assert not (tmp_path / "b").exists()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 700) | st.floats(-5, 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inner = [value[key] for key in keys if isinstance(value[key], dict | list)]
    return found + [place for part in inner for place in places(part)]


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from(["input", "lists", "prepared", "distilabel"]))
def test_whatever_a_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    rows: dict[str, dict[str, Any]] = {
        "input": {"messages": CHAT, "logprobs": [[GOOD, {**GOOD, "token": "token_id:6"}]] * 3},
        "lists": {"messages": CHAT, "logprobs": [[-1.0]] * 3, "target_token_ids": [[1]] * 3},
        "prepared": prepared([5, 6, 7], [-100, 6, 7], {1: [-1, -2, -3], 2: [-1, -2, -3]}, 1),
        "distilabel": distilabel_row("Hi.", ids=True)[0],
    }
    row = json.loads(json.dumps(rows[kind]))
    for _ in range(data.draw(st.integers(0, 2))):
        container, key = data.draw(st.sampled_from(places(row)))
        container[key] = data.draw(values)
    file = write(tmp_path_factory.mktemp("fuzz") / "data.jsonl", [row])
    read = read_distilabel if kind == "distilabel" else read_axolotl
    survey, refusal = Survey(len(TOKENIZER)), ""
    try:
        for sequence in read(file, TOKENIZER):
            survey.add(sequence)
    except InputError as error:
        refusal = str(error)
    assert not refusal or "data.jsonl:1" in refusal


# --- distilabel -------------------------------------------------------------------------------

PROMPT = [{"role": "user", "content": "What now?"}]
REPLY = "Freeze the card at once."


def spelled_alone() -> list[int]:
    """Ids that no other id is spelled like."""
    spelling = Spelling(TOKENIZER)
    words: dict[str, list[int]] = {}
    for token in range(len(TOKENIZER)):
        words.setdefault(spelling.token(token), []).append(token)
    return [ids[0] for ids in words.values() if len(ids) == 1]


def distilabel_row(
    reply: str = REPLY, *, ids: bool, end: bool = True, echo: bool = False
) -> tuple[dict[str, Any], list[int], int]:
    """A row as distilabel writes it, its token ids, and the index of the reply's first token."""
    spelling = Spelling(TOKENIZER)
    prompt = TOKENIZER.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    first = len(TOKENIZER(prompt)["input_ids"])
    tokens = TOKENIZER(prompt)["input_ids"] + TOKENIZER(reply)["input_ids"]
    if end:
        tokens.append(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
    others = spelled_alone()[200:203]
    rows: list[Any] = []
    for token in tokens[0 if echo else first :]:
        held = [token, *(i for i in others if i != token)]
        rows.append(
            [
                {"token": f"token_id:{i}" if ids else spelling.token(i), "logprob": -0.5 - 2 * n}
                for n, i in enumerate(held)
            ]
        )
    if echo:
        rows[0] = None
    output = prompt + reply if echo else reply
    metadata = {"raw_input_t_0": PROMPT, "raw_output_t_0": output, "statistics_t_0": {}}
    row = {"generation": output, "distilabel_metadata": metadata, "llm_t_0_logprobs": rows}
    return row, tokens, first


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("echo", [True, False])
def test_distilabel_rows_belong_to_the_reply(
    teacher: Path, tmp_path: Path, ids: bool, end: bool, echo: bool
) -> None:
    row, tokens, first = distilabel_row(ids=ids, end=end, echo=echo)
    file = write(tmp_path / "data.jsonl", [row, {**row, "llm_t_0_logprobs": None}])
    store = load(file, teacher, tmp_path / "out", "distilabel")
    assert len(store) == 1  # the other generation failed
    sequence = store[0]
    assert sequence.token_ids.tolist() == tokens
    assert sequence.labelled.tolist() == list(range(first - 1, len(tokens) - 1))
    for position in sequence.labelled.tolist():
        weights = entries(store, 0, position)
        best = max(weights, key=weights.__getitem__)
        assert best == tokens[position + 1]
        assert weights[best] == nearest_level(store, math.exp(-0.5))


def test_distilabel_without_metadata_or_with_a_plain_prompt(teacher: Path, tmp_path: Path) -> None:
    row, tokens, _ = distilabel_row(ids=True)
    plain = {"instruction": "What now?", "generation": REPLY}
    plain["llm_t_0_logprobs"] = row["llm_t_0_logprobs"]
    store = load(write(tmp_path / "a.jsonl", [plain]), teacher, tmp_path / "a", "distilabel")
    assert store[0].token_ids.tolist() == tokens
    text = TOKENIZER("Keep the card.")["input_ids"]
    rows = [None, *([{"token": f"token_id:{i}", "logprob": -1.0}] for i in text[1:])]
    metadata = {"raw_input_t": "Keep", "raw_output_t": "Keep the card."}
    row = {"distilabel_metadata": metadata, "llm_t_logprobs": rows}
    store = load(write(tmp_path / "b.jsonl", [row]), teacher, tmp_path / "b", "distilabel")
    assert store[0].token_ids.tolist() == text
    assert store[0].labelled.tolist() == list(range(len(text) - 1))


def test_distilabel_tokens_that_name_no_single_id_are_refused(
    teacher: Path, tmp_path: Path
) -> None:
    row, _, _ = distilabel_row(ids=False)
    for token, message in (("\ufffd", "ids of the tokenizer are spelled"), ("☂☂", "no id of the")):
        changed = json.loads(json.dumps(row))
        changed["llm_t_0_logprobs"][1][1]["token"] = token
        file = write(tmp_path / "bad.jsonl", [changed])
        with pytest.raises(InputError, match="return-tokens-as-token-ids") as refused:
            load(file, teacher, tmp_path / "out", "distilabel")
        assert message in str(refused.value)
        assert "row 1 of `llm_t_0_logprobs`" in str(refused.value)
    assert not (tmp_path / "out").exists()


BAD_DISTILABEL: dict[str, tuple[dict[str, Any], str]] = {
    "too few rows": ({"llm_t_0_logprobs": [[GOOD]]}, "has 1 rows, the reply has"),
    "no column": ({"llm_t_0_logprobs": ...}, "wants one column `llm_TASK_logprobs`"),
    "two tasks": ({"llm_other_logprobs": []}, "wants one column `llm_TASK_logprobs`"),
    "no prompt": ({"distilabel_metadata": {}}, "wants the prompt in"),
    "a list of replies": ({"distilabel_metadata": {}, "generation": ["a"]}, "wants the prompt in"),
}


@pytest.mark.parametrize("case", BAD_DISTILABEL)
def test_bad_distilabel_rows_are_refused(teacher: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD_DISTILABEL[case]
    row, _, _ = distilabel_row(ids=True)
    row = {key: value for key, value in {**row, **change}.items() if value is not ...}
    file = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError) as refused:
        load(file, teacher, tmp_path / "out", "distilabel")
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


# --- the store that an import makes -----------------------------------------------------------


def test_import_command_makes_a_licensed_store_once(
    run: Run, teacher: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "data.jsonl", [{"messages": CHAT, "logprobs": chat_rows(9)}] * 3)
    arguments = ["import", file, "--format", "axolotl", "--tokenizer", teacher, "--json"]
    arguments += ["--teacher", "Big-Teacher-70B", "--license", "CC-BY-4.0"]
    code, out, _ = run(*arguments, "--out", tmp_path / "out")
    assert code == 0
    found = json.loads(out)
    assert found["sequences"] == 3
    assert [s["license"] for s in found["sources"]] == ["CC-BY-4.0", "not stated"]
    assert [s["name"] for s in found["sources"]] == ["data.jsonl", "Big-Teacher-70B"]
    assert found["teacher"].startswith("imported:")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Big-Teacher-70B" in card
    assert "CC-BY-4.0" in card
    assert "were imported from a file" in card
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert json.loads(run(*arguments, "--out", tmp_path / "out")[1]) == found
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before
    again = json.loads(run(*arguments, "--out", tmp_path / "again")[1])
    assert again["digest"] == found["digest"]
    other = [x if x != "CC-BY-4.0" else "MIT" for x in arguments]
    assert json.loads(run(*other, "--out", tmp_path / "out")[1])["digest"] != found["digest"]
    code, out, _ = run(*arguments[:3], "csv", *arguments[4:], "--out", tmp_path / "x")
    assert code == 2
    assert "known formats: axolotl, distilabel" in json.loads(out)["error"]


def test_an_import_of_several_shards_is_whole(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": str(n), "messages": CHAT, "logprobs": chat_rows(9)} for n in range(7)]
    file = write(tmp_path / "data.parquet", rows)
    one = load(file, teacher, tmp_path / "one")
    monkeypatch.setattr("seodang.softlabels.exchange.SHARD_TOKENS", 12)
    many = load(file, teacher, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("labels-*.parquet"))) > 2
    assert many.verify() == []
    assert [s.document_id for s in many] == [str(n) for n in range(7)]
    for left, right in zip(one, many, strict=True):
        assert np.array_equal(left.ids, right.ids)
        assert np.array_equal(left.weights, right.weights)
