"""What `labels stats` says of a store, against a plain count of everything it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from seodang.errors import InputError
from seodang.softlabels import SoftLabelStore
from seodang.softlabels import open as open_store
from seodang.softlabels.stats import QUANTILES, Counts, Histogram, lines, sparkline, statistics
from seodang.softlabels.stats_plot import write_plot
from tiny_labels import make_store, run_labels

Run = Callable[..., tuple[int, str, str]]

# Synthetic: written for these tests.
DOCUMENTS = [
    {"id": f"d{n}", "text": f"Notice {n}. " + "card payment 카드 " * n} for n in range(1, 9)
]
ESTIMATORS = {
    "residual": ["--estimator", "residual", "--k", "40"],
    "sampled": ["--estimator", "sampled", "--layout", "small"],
    "head-tail": ["--estimator", "head-tail", "--layout", "small"],
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return run_labels(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    for name, options in ESTIMATORS.items():
        make_store(folder, name, *options, documents=DOCUMENTS)
    return folder


@pytest.fixture(params=ESTIMATORS)
def store(folder: Path, request: pytest.FixtureRequest) -> SoftLabelStore:
    return open_store(folder / str(request.param))


def nearest_rank(values: np.ndarray, share: float) -> float:
    """The quantile by its definition: the least value that ``share`` of all do not exceed."""
    return float(np.sort(values)[max(0, math.ceil(share * len(values)) - 1)])


def test_distributions_are_those_of_the_stored_values(store: SoftLabelStore) -> None:
    found = statistics(store)
    sequences = list(store)
    for name in ("entropy", "head_mass"):
        values = np.concatenate([getattr(s, name) for s in sequences]).astype(np.float64)
        row = found[name]
        step = row["histogram"]["step"]
        assert row["count"] == len(values) == store.num_tokens == found["tokens"]
        assert row["mean"] == pytest.approx(values.mean())
        assert (row["min"], row["max"]) == (values.min(), values.max())
        for share, quantile in row["quantiles"].items():
            expected = nearest_rank(values, float(share))
            assert quantile == pytest.approx(expected, abs=1.01 * step / 16)
        counts = row["histogram"]["counts"]
        edges = np.append(np.arange(len(counts)) * step - 1e-5, np.inf)
        assert counts == np.histogram(values, edges)[0].tolist()
    entries = np.concatenate([np.diff(s.offsets)[s.labelled] for s in sequences])
    assert found["entries"]["mean"] == pytest.approx(entries.mean())
    assert found["entries"]["counts"] == np.bincount(entries).tolist()


def test_observed_tokens_are_counted_one_by_one(store: SoftLabelStore) -> None:
    stored, came = [], 0
    for sequence in store:
        for position in sequence.labelled.tolist():
            if position + 1 == len(sequence.token_ids):
                continue
            came += 1
            for entry in range(sequence.offsets[position], sequence.offsets[position + 1]):
                if sequence.ids[entry] == sequence.token_ids[position + 1]:
                    stored.append(-math.log(sequence.weights[entry]))
    found = statistics(store)["observed"]
    assert (found["tokens"], found["stored"]) == (came, len(stored))
    assert found["share"] == len(stored) / came
    assert found["surprise"]["mean"] == pytest.approx(np.mean(stored), rel=1e-5)


def test_values_that_are_rounded_to_steps_stay_in_their_bins() -> None:
    histogram = Histogram(1.0, 1 / 15)
    histogram.add((np.arange(16) / 15).astype(np.float32))
    assert histogram.summary()["histogram"]["counts"] == [1] * 16


def test_share_of_drawn_entries(folder: Path) -> None:
    assert statistics(open_store(folder / "residual"))["drawn_share"] == 0
    assert statistics(open_store(folder / "sampled"))["drawn_share"] == 1
    store = open_store(folder / "head-tail")
    weights = np.concatenate([sequence.weights for sequence in store])
    least = np.float32(store.header.parameters["threshold"])
    assert statistics(store)["drawn_share"] == pytest.approx((weights == least).mean())


def test_bytes_sum_up_to_the_whole_store(store: SoftLabelStore) -> None:
    found = statistics(store)["bytes"]
    assert sum(found.values()) == sum(f.stat().st_size for f in store.path.rglob("*"))
    assert {"document_id", "token_ids", "entropy", "record", "manifest.json"} <= set(found)
    assert min(found.values()) > 0
    assert found["(parquet framing)"] < sum(found.values())


def test_shards_do_not_matter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seodang.softlabels.capture.SHARD_TOKENS", 40)
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    many = make_store(tmp_path, "many", *ESTIMATORS["residual"], documents=DOCUMENTS)
    assert len(list(many.glob("labels-*.parquet"))) > 3
    one, other = (statistics(open_store(path)) for path in (folder / "residual", many))
    for name in ("entropy", "head_mass", "entries", "observed", "tokens", "sequences"):
        assert one[name] == other[name]
    assert sum(other["bytes"].values()) == sum(f.stat().st_size for f in many.rglob("*"))


chunks = st.lists(
    arrays.arrays(np.float32, st.integers(0, 30), elements=st.floats(0, 12, width=32)), max_size=5
)


@settings(max_examples=200, deadline=None)
@given(chunks, st.sampled_from([0.25, 0.5, 1 / 16]))
def test_histogram_is_right_whatever_it_is_given(parts: list[Any], step: float) -> None:
    histogram = Histogram(10.0, step)
    for part in parts:
        histogram.add(part)
    values = np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float64)
    summary = histogram.summary()
    assert summary["count"] == len(values)
    if not len(values):
        return
    assert summary["mean"] == pytest.approx(values.mean(), abs=1e-9)
    assert (summary["min"], summary["max"]) == (values.min(), values.max())
    assert sum(summary["histogram"]["counts"]) == len(values)
    quantiles = list(summary["quantiles"].values())
    assert quantiles == sorted(quantiles)
    for share, quantile in zip(QUANTILES, quantiles, strict=True):
        expected = nearest_rank(values, share)
        if expected <= 10:  # beyond the limit only the largest value is known
            assert quantile == pytest.approx(expected, abs=1.01 * step / 16)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=20), max_size=4))
def test_counts_are_exact(parts: list[list[int]]) -> None:
    counts = Counts()
    for part in parts:
        counts.add(np.array(part, np.int64))
    values = np.array([value for part in parts for value in part], np.int64)
    summary = counts.summary()
    assert summary["count"] == len(values)
    if len(values):
        assert summary["counts"] == np.bincount(values).tolist()
        assert summary["mean"] == pytest.approx(values.mean())
        for share, quantile in summary["quantiles"].items():
            assert quantile == nearest_rank(values, float(share))


def test_sparkline_shows_every_bin_that_is_not_empty() -> None:
    assert sparkline([0, 1, 500, 1000]) == " ▁▄█"


def test_command_prints_and_plots(run: Run, folder: Path, tmp_path: Path) -> None:
    store = folder / "head-tail"
    code, out, _ = run("stats", store, "--json")
    assert code == 0
    found = json.loads(out)
    assert found == json.loads(json.dumps(statistics(open_store(store))))
    code, out, _ = run("stats", store, "--plot", tmp_path / "a.png")
    assert out == "\n".join(lines(found)) + "\n"
    assert f"{found['tokens']:,} labelled tokens in 8 sequences" in out
    total = f"{sum(found['bytes'].values()):,}"
    assert total in out.splitlines()[-1]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for suffix in (".png", ".svg", ".pdf"):
        for name in ("one", "two"):
            write_plot(found, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert "bytes per labelled token" in (tmp_path / "one.svg").read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_plot_of_an_unknown_kind_is_refused_at_once(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    code, _, err = run("stats", folder / "sampled", "--plot", tmp_path / "a.jpeg")
    assert code == 2
    assert "a plot is written as .png, .svg or .pdf" in err
    with pytest.raises(InputError):
        write_plot({}, tmp_path / "plot")
    assert list(tmp_path.iterdir()) == []
