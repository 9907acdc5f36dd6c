"""How fast is the store read, how large is it, and does that stay so as it grows?

    python benchmarks/store.py                       # against other containers, same entries
    python benchmarks/store.py --grow 1e5 1e6 1e7 1e8

Entries are synthetic (vocabulary 163,840, about 9 entries a token, ids by Zipf's law), of
sequences of --length tokens. The rivals hold the same ids and weights: Parquet lists with zstd
(what axolotl and distilabel write), Parquet lists without compression, and a NumPy file for each
sequence. One process, one thread; the best of --repeats; ratios are to the layout `fast`, or to the
smallest store. Memory is what the reader takes beside the pages of the files, after it has opened
every shard. A small store is read from the processor's cache, a large one from memory: random
reading feels that.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seodang.artifact import begin, write_atomically
from seodang.corpus.sequences import TokenSequence
from seodang.softlabels import open as open_store
from seodang.softlabels.capture import plan_shards
from seodang.softlabels.estimators import Entries
from seodang.softlabels.shards import StoreHeader, shard_bytes
from seodang.softlabels.store import SoftLabelStore, shard_name

VOCABULARY = 163_840
THRESHOLD = 0.06


def synthetic(number: int, length: int) -> tuple[TokenSequence, Entries]:
    """A sequence and entries of about the shape that `head-tail` has on real text."""
    rng = np.random.default_rng(number)
    zipf = np.exp(rng.random(length * 10) * np.log(VOCABULARY)).astype(np.int64) - 1
    rows = rng.integers(0, length, length * 10 - length // 2)
    pairs = np.unique(rows * VOCABULARY + zipf[: len(rows)])  # no id twice at a position
    rows, ids = np.divmod(pairs, VOCABULARY)
    counts, nnz = np.bincount(rows, minlength=length), len(ids)
    weights = np.full(nnz, THRESHOLD)
    exact = rng.random(nnz) < 0.26
    weights[exact] = THRESHOLD + (1 - THRESHOLD) * rng.random(exact.sum()) ** 2
    text = zipf[:length].astype(np.int32)
    tokens = TokenSequence(f"synthetic-{number}", text, np.arange(length, dtype=np.int32))
    ones = np.ones(length, np.float32)
    return tokens, Entries(counts, ids.astype(np.int32), weights, ones / 2, 3 * ones)


def write_store(path: Path, tokens: int, length: int, layout: str) -> SoftLabelStore:
    """A store of about ``tokens`` tokens; of a large one, shards repeat some 2^21 tokens."""
    header = StoreHeader(
        estimator="head-tail",
        parameters={"threshold": THRESHOLD},
        layout=layout,
        vocab_size=VOCABULARY,
        teacher="0" * 64,
        tokenizer="0" * 64,
    )
    draft = begin(path, "soft-labels", {"synthetic": True, "layout": layout}, {})
    count = max(1, tokens // length)
    shards = list(plan_shards([length] * count))
    different = max(1, min(len(shards), (1 << 21) // (length * (shards[0].stop))))
    written: list[bytes] = []
    for number, shard in enumerate(shards):
        last = number == len(shards) - 1
        if number < different or last:
            parts = [synthetic(i, length) for i in range(shard.start, shard.stop)]
            data = shard_bytes(header, *zip(*parts, strict=True))
            written.append(data)
        else:
            data = written[number % different]
        write_atomically(path / shard_name(number), data)
    rows = [shard.stop - shard.start for shard in shards]
    return SoftLabelStore(draft.finish(summary={"tokens": count * length, "rows": rows}))


def rate(read: Callable[[int], object], order: list[int], length: int, repeats: int) -> float:
    """Million tokens a second of the best repeat."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for index in order:
            read(index)
        best = min(best, time.perf_counter() - start)
    return len(order) * length / best / 1e6


def against_others(tokens: int, length: int, repeats: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        stores = {
            layout: write_store(folder / layout, tokens, length, layout)
            for layout in ("fast", "small")
        }
        sequences = list(stores["fast"])
        table = pa.table(
            {
                "token_ids": [s.token_ids for s in sequences],
                "counts": [np.diff(s.offsets) for s in sequences],
                "ids": [s.ids for s in sequences],
                "weights": [s.weights for s in sequences],
            }
        )
        readers: dict[str, tuple[Callable[[int], object], float]] = {
            name: (store.__getitem__, store.bytes_per_token) for name, store in stores.items()
        }
        for name, compression in (("Parquet lists, zstd", "ZSTD"), ("Parquet lists", "NONE")):
            file = folder / f"{compression}.parquet"
            pq.write_table(table, file, compression=compression, row_group_size=1)
            opened = pq.ParquetFile(file, memory_map=True)

            def group(index: int, opened: pq.ParquetFile = opened) -> list[object]:
                read = opened.read_row_group(index, use_threads=False)
                return [read[c].chunk(0).values.to_numpy() for c in read.column_names]

            readers[name] = (group, file.stat().st_size / tokens)
        (folder / "npy").mkdir()
        for index, s in enumerate(sequences):
            np.savez(folder / "npy" / f"{index}.npz", t=s.token_ids, i=s.ids, w=s.weights)
        size = sum(f.stat().st_size for f in (folder / "npy").iterdir()) / tokens

        def npz(index: int) -> list[object]:
            with np.load(folder / "npy" / f"{index}.npz", allow_pickle=False) as file:
                return [file[name] for name in "tiw"]

        readers["NumPy files"] = (npz, size)
        print(f"{tokens:,} tokens in sequences of {length}, vocabulary {VOCABULARY:,}, synthetic")
        print(f"{'container':<22} {'B/token':>8} {'sequential':>12} {'random':>10}   Mtok/s")
        order = list(range(len(sequences)))
        shuffled = np.random.default_rng(0).permutation(len(sequences)).tolist()
        reference = 0.0
        for name, (read, size) in readers.items():
            one, two = (rate(read, o, length, repeats) for o in (order, shuffled))
            reference = reference or one
            print(f"{name:<22} {size:>8.1f} {one:>12.2f} {two:>10.2f}   {one / reference:.3f}")
    finally:
        shutil.rmtree(folder)


def anonymous_memory() -> float:
    """MiB of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def grow(sizes: list[int], length: int, layout: str, repeats: int) -> None:
    print(f"layout {layout}, sequences of {length}, synthetic")
    print(
        f"{'tokens':>12} {'B/token':>8} {'open ms':>8} {'seq':>7} {'random':>7} {'memory MiB':>11}"
    )
    first = None
    for size in sizes:
        folder = Path(tempfile.mkdtemp())
        try:
            write_store(folder / "store", size, length, layout)
            before = anonymous_memory()
            start = time.perf_counter()
            store = open_store(folder / "store")
            opening = 1e3 * (time.perf_counter() - start)
            rng = np.random.default_rng(0)
            some = min(len(store), 4_000_000 // length)
            begin_at = int(rng.integers(0, len(store) - some + 1))
            order = list(range(begin_at, begin_at + some))
            shuffled = rng.integers(0, len(store), some).tolist()
            _ = store.lengths  # a reader in random order has opened every shard once
            speeds = [rate(store.__getitem__, o, length, repeats) for o in (order, shuffled)]
            memory = anonymous_memory() - before
            row = [store.bytes_per_token, *speeds]
            first = first or row
            print(
                f"{store.num_tokens:>12,} {row[0]:>8.2f} {opening:>8.1f} {row[1]:>7.1f} "
                f"{row[2]:>7.1f} {memory:>11.0f}   "
                + " ".join(f"{a / b:.2f}" for a, b in zip(row, first, strict=True)),
                flush=True,
            )
        finally:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=4e5)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grow", type=float, nargs="+")
    parser.add_argument("--layout", choices=["fast", "small"], default="fast")
    options = parser.parse_args()
    if options.grow:
        sizes = [int(size) for size in options.grow]
        grow(sizes, options.length, options.layout, options.repeats)
    else:
        against_others(int(options.tokens), options.length, options.repeats)


if __name__ == "__main__":
    main()
