"""What a store holds and what it costs: distributions over its positions, bytes of each column.

Everything is counted in one pass over the sequences with a fixed amount of memory: a histogram
fine enough to read quantiles from stands for the values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from seodang.progress import track
from seodang.softlabels.observed import drawn, entry_counts, observed_weights
from seodang.softlabels.shards import ENTROPY_STEP, HEAD_MASS_STEP, read_footer
from seodang.softlabels.store import SoftLabelStore

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FINE = 16  # bins that quantiles are read from, in each bin that is shown
_NEARLY = 1e-3  # of such a bin: a multiple of the step may be a little less in floating point


class Histogram:
    """The distribution of values from 0 to ``limit``, in bins of the width ``step``.

    Count, mean, smallest and largest value are exact; a quantile is off by at most ``step / 16``.
    The limit itself has a bin of its own, so that values which are rounded to whole steps fall
    into one bin each.
    """

    def __init__(self, limit: float, step: float) -> None:
        self.step = step
        self.count = 0
        self.total = 0.0
        self.smallest, self.largest = math.inf, -math.inf
        self.bins = np.zeros(_FINE * (math.floor(limit / step + _NEARLY) + 1), np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count more values; those beyond the limits count in the outermost bins."""
        if not len(values):
            return
        self.count += len(values)
        self.total += float(values.sum(dtype=np.float64))
        self.smallest = min(self.smallest, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        fine = values.astype(np.float64) * (_FINE / self.step) + _NEARLY
        index = np.clip(fine, 0, len(self.bins) - 1).astype(np.int64)
        self.bins += np.bincount(index, minlength=len(self.bins))

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the values lie."""
        index = int(np.searchsorted(np.cumsum(self.bins), share * self.count))
        value = min(index, len(self.bins) - 1) * self.step / _FINE
        return min(max(value, self.smallest), self.largest)

    def summary(self) -> dict[str, Any]:
        """The distribution as a JSON object; bin n holds the values from n · ``step`` on."""
        if not self.count:
            return {"count": 0}
        return {
            "count": self.count,
            "mean": self.total / self.count,
            "min": self.smallest,
            "max": self.largest,
            "quantiles": {f"{share:g}": self.quantile(share) for share in QUANTILES},
            "histogram": {
                "step": self.step,
                "counts": self.bins.reshape(-1, _FINE).sum(axis=1).tolist(),
            },
        }


@dataclass
class Counts:
    """The distribution of small whole numbers, exactly."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: npt.NDArray[np.int64]) -> None:
        """Count more values."""
        found = np.bincount(values, minlength=len(self.counts))
        found[: len(self.counts)] += self.counts
        self.counts = found

    def summary(self) -> dict[str, Any]:
        """The distribution as a JSON object: ``counts[n]`` positions have the value n."""
        count = int(self.counts.sum())
        if not count:
            return {"count": 0}
        values, upto = np.arange(len(self.counts)), np.cumsum(self.counts)
        return {
            "count": count,
            "mean": float(values @ self.counts) / count,
            "min": int(np.flatnonzero(self.counts)[0]),
            "max": int(values[-1]),
            "quantiles": {
                f"{share:g}": int(np.searchsorted(upto, share * count)) for share in QUANTILES
            },
            "counts": self.counts.tolist(),
        }


def statistics(store: SoftLabelStore) -> dict[str, Any]:
    """Everything that ``labels stats`` says of a store, as a JSON object.

    ``entropy`` (nats) and ``head_mass`` are distributions over labelled positions,
    ``entries`` over the numbers of entries of a position. ``drawn_share`` is the share of entries
    that were drawn. ``observed`` holds the tokens that came:
    how many of them a label before them could have held, how many it does, and the ``surprise``
    of those, minus the logarithm of their weight in nats. ``bytes`` is the size of every part of
    the store, and sums up to all of it.
    """
    entropy = Histogram(math.log(store.vocab_size), step=2 * ENTROPY_STEP)
    head_mass = Histogram(1.0, step=HEAD_MASS_STEP)
    surprise = Histogram(20.0, step=1 / 2)
    entries = Counts()
    came = total = estimates = 0
    with track("Reading soft labels", store.num_tokens, "tok") as advance:
        for sequence in store:
            entropy.add(sequence.entropy)
            head_mass.add(sequence.head_mass)
            entries.add(entry_counts(sequence))
            weights = observed_weights(sequence)
            came += int(np.isfinite(weights).sum())
            surprise.add(np.maximum(0.0, -np.log(weights[weights > 0])))
            total += len(sequence.weights)
            estimates += int(drawn(store.header, sequence.weights).sum())
            advance(len(sequence.labelled))
    return {
        "digest": store.artifact.digest,
        "estimator": store.estimator,
        "parameters": store.header.parameters,
        "tokens": entropy.count,
        "sequences": len(store),
        "entropy": entropy.summary(),
        "head_mass": head_mass.summary(),
        "entries": entries.summary(),
        "drawn_share": estimates / max(1, total),
        "observed": {
            "tokens": came,
            "stored": surprise.count,
            "share": surprise.count / max(1, came),
            "surprise": surprise.summary(),
        },
        "bytes": bytes_of(store),
    }


def bytes_of(store: SoftLabelStore) -> dict[str, int]:
    """Bytes of each part of a store: its columns, Parquet's own framing, and the other files."""
    sizes: dict[str, int] = {}
    shards = sorted(store.path.glob("labels-*.parquet"))
    framing = 0
    for shard in shards:
        metadata = read_footer(shard)
        framing += shard.stat().st_size
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                name = chunk.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
                framing -= chunk.total_compressed_size
    sizes["(parquet framing)"] = framing
    for file in sorted(store.path.rglob("*")):
        if file.is_file() and file not in shards:
            sizes[file.relative_to(store.path).as_posix()] = file.stat().st_size
    return sizes


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What :func:`statistics` found, as lines for people."""
    parameters = ", ".join(f"{name} {value}" for name, value in found["parameters"].items())
    yield f"{found['tokens']:,} labelled tokens in {found['sequences']:,} sequences"
    drawn_share = f"{found['drawn_share']:.0%} of entries drawn"
    yield f"estimator {found['estimator']}, {parameters}; {drawn_share}"
    yield ""
    shown = ("0.05", "0.25", "0.5", "0.75", "0.95")
    heads = "".join(f"{float(share):>9.0%}" for share in shown)
    yield f"{'':<18}{'mean':>9}{heads}{'max':>9}"
    rows = {
        "entropy (nats)": (found["entropy"], ".2f"),
        "head mass": (found["head_mass"], ".3f"),
        "entries": (found["entries"], ".1f"),
        "surprise (nats)": (found["observed"]["surprise"], ".2f"),
    }
    for name, (row, form) in rows.items():
        if row["count"]:
            values = [row["mean"], *(row["quantiles"][share] for share in shown), row["max"]]
            yield f"{name:<18}" + "".join(f"{value:>9{form}}" for value in values)
    observed = found["observed"]
    yield (
        f"surprise is of the {observed['stored']:,} of {observed['tokens']:,} observed tokens "
        f"({observed['share']:.1%}) that their label holds"
    )
    yield ""
    for name, row in (("entropy", found["entropy"]), ("head mass", found["head_mass"])):
        if row["count"]:
            counts, step = row["histogram"]["counts"], row["histogram"]["step"]
            yield f"{name:<10} 0 {sparkline(counts)} {step * (len(counts) - 1):.4g}"
    yield ""
    yield f"{'bytes of':<28}{'all':>14}{'per token':>12}"
    for name, size in found["bytes"].items():
        yield f"{name:<28}{size:>14,}{size / max(1, found['tokens']):>12.2f}"
    size = sum(found["bytes"].values())
    yield f"{'all':<28}{size:>14,}{size / max(1, found['tokens']):>12.2f}"


def sparkline(counts: list[int]) -> str:
    """Counts as one line of bars; only an empty bin has none."""
    highest = max(counts)
    return "".join("▁▂▃▄▅▆▇█"[-(-8 * n // highest) - 1] if n else " " for n in counts)
