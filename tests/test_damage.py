"""Damage to a store, anywhere in it: `labels verify` finds it, and no reader or training uses it.

Positions are random and fresh in every run; a failure names the file and the bit.
"""

import io
import random
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import typer

from damage import flipped, truncated
from seodang.causal_lm import load_tokenizer, tokenizer_fingerprint
from seodang.cli import labels_app
from seodang.errors import InputError
from seodang.recipe import StudentConfig
from seodang.softlabels import open as open_store
from seodang.softlabels.shards import read_footer
from seodang.student.distillation import Distillation
from seodang.student.train import train
from tiny import tiny_teacher
from tiny_store import LAYOUTS, config_of, sequences, synthetic_store


@pytest.fixture(scope="module", params=LAYOUTS)
def store(request, tmp_path_factory):
    """Two shards of three short sequences each."""
    path = tmp_path_factory.mktemp("damage") / request.param
    config = config_of("head-tail", layout=request.param)
    return synthetic_store(path, config, sequences(6, longest=9), shard_size=3).path


(VERIFY,) = [c.callback for c in labels_app.registered_commands if c.name == "verify"]


def verify(path):
    """Exit code of `seodang labels verify` and all that it says."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            VERIFY(store=path, as_json=False)
        except typer.Exit as stopped:
            return stopped.exit_code, said.getvalue()
    return 0, said.getvalue()


def content(path):
    """All that a training run takes from a store."""
    return [
        (
            s.document_id,
            s.digest,
            *(a.tobytes() for a in (s.token_ids, s.labelled, s.offsets, s.ids, s.weights)),
        )
        for s in open_store(path)
    ]


def bits(file, step):
    """One random bit out of every ``step`` bytes of a file, in turn."""
    for start in range(0, file.stat().st_size, step):
        within = min(step, file.stat().st_size - start)
        yield 8 * start + random.randrange(8 * within)


def test_verify_finds_a_flipped_bit_in_any_byte(store):
    assert verify(store) == (0, f"{store}: verified\n")
    for file in sorted(store.iterdir()):
        for bit in bits(file, 1 if file.suffix == ".json" else 4):
            with flipped(file, bit):
                code, said = verify(store)
            assert code, (file.name, bit)
            assert file.name in said, (file.name, bit, said)
    assert verify(store) == (0, f"{store}: verified\n")


def test_verify_finds_every_truncation_and_missing_file(store):
    for file in sorted(store.iterdir()):
        whole = file.stat().st_size
        for size in {0, 1, whole - 1, *(random.randrange(whole) for _ in range(60))}:
            with truncated(file, size):
                code, said = verify(store)
            assert code, (file.name, size)
            assert file.name in said, (file.name, size, said)
        moved = file.rename(store.parent / "away")
        code, said = verify(store)
        moved.rename(file)
        assert code == (2 if file.suffix == ".json" else 1)
        assert file.name in said
    assert verify(store) == (0, f"{store}: verified\n")


def test_readers_alone_use_nothing_that_was_changed(store):
    """Without the hashes of the manifest: a shard is refused, or gives what was written."""
    before = content(store)
    in_place = store.name == "fast"
    for file in sorted(store.glob("*.parquet")):
        harmless = 0
        for bit in bits(file, 10):
            with flipped(file, bit):
                said = ""
                try:
                    assert content(store) == before, (file.name, bit)
                    harmless += 1
                except InputError as error:
                    said = str(error)
            assert not said or file.name in said, (file.name, bit)
        if not in_place:
            assert not harmless  # all of the file is under its seal
        for size in range(0, file.stat().st_size, 29):
            with truncated(file, size), pytest.raises(InputError, match=file.name):
                content(store)
    assert content(store) == before


def in_place_bits(shard, column):
    """The bits of a column's values where they are read in place, but for their lengths."""
    footer = read_footer(shard)
    group = footer.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (chunk,) = [c for c in columns if c.path_in_schema.split(".")[0] == column]
    return chunk.data_page_offset + chunk.total_compressed_size


def test_a_flip_in_tokens_or_records_is_told_by_its_row_alone(tmp_path):
    items = sequences(12, longest=30)
    path = synthetic_store(tmp_path / "s", config_of("head-tail", layout="fast"), items).path
    shard = path / "labels-00000.parquet"
    whole = open_store(path)
    before = content(path)
    sizes = {
        "token_ids": [4 * len(item.token_ids) for item in items],
        "record": [2 * len(s.labelled) + 3 * len(s.ids) for s in whole],
    }
    for column, size in sizes.items():
        gap = 4 if column == "record" else 0  # Parquet's length of a value, which nobody reads
        end = in_place_bits(shard, column)
        for row in range(len(items)):
            stop = end - sum(n + gap for n in size[row + 1 :])
            byte = random.randrange(stop - size[row], stop)
            with flipped(shard, 8 * byte + random.randrange(8)):
                opened = open_store(path)
                with pytest.raises(InputError, match=rf"labels-00000.parquet: row {row}: damaged"):
                    opened[row]
                for other in (row - 1, (row + 1) % len(items)):
                    found = opened[other]
                    assert found.weights.tobytes() == before[other][-1]


CONFIG = StudentConfig(layers=1, epochs=2, batch_tokens=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=2, hidden=16)


@pytest.fixture(scope="module", params=LAYOUTS)
def trainable(request, teacher, tmp_path_factory):
    """A synthetic store that a tiny student can be trained on."""
    return synthetic_store(
        tmp_path_factory.mktemp("trainable") / request.param,
        config_of("head-tail", layout=request.param),
        sequences(24, longest=20),
        shard_size=12,
        vocabulary=600,
        tokenizer=tokenizer_fingerprint(load_tokenizer(teacher)),
    ).path


def test_training_stops_at_a_flipped_bit_anywhere(trainable, teacher, tmp_path):
    files = sorted(trainable.iterdir())
    for number in range(40):
        file = random.choice(files)
        bit = random.randrange(8 * file.stat().st_size)
        with flipped(file, bit), pytest.raises(InputError, match=file.name):
            train(open_store(trainable), teacher, CONFIG, tmp_path / str(number))
        assert not (tmp_path / str(number) / "training.jsonl").exists()


@pytest.mark.parametrize("trainable", ["fast"], indirect=True)  # `small` is held in memory
def test_training_stops_at_damage_that_comes_while_it_runs(
    trainable, teacher, tmp_path, monkeypatch
):
    """Every record of the second shard is damaged after the first step, on the disk."""
    shard = trainable / "labels-00001.parquet"
    saved = shard.read_bytes()
    end = in_place_bits(shard, "record")
    steps, forward = [], Distillation.forward

    def damages(self, batch, scale):
        steps.append(1)
        if len(steps) == 2:
            data = bytearray(saved)
            for byte in range(end - 600, end):
                data[byte] ^= 1
            with shard.open("r+b") as file:
                file.write(data)
        return forward(self, batch, scale)

    monkeypatch.setattr(Distillation, "forward", damages)
    with pytest.raises(InputError, match=r"labels-00001.parquet: row \d+: damaged"):
        train(open_store(trainable), teacher, CONFIG, tmp_path / "s")
    assert 2 <= len(steps) < np.ceil(sum(len(s.token_ids) for s in sequences(24, longest=20)) / 32)
    with shard.open("r+b") as file:
        file.write(saved)
    assert verify(trainable)[0] == 0
