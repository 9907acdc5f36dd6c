"""Capture: the teacher's own distributions, the same bytes however it ran, and poisoned input."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seodang.artifact import Draft, write_atomically
from seodang.causal_lm import CausalLM
from seodang.corpus.sequences import TokenSequence, labelled_throughout
from seodang.errors import InputError, WorkFailed
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels import capture as capture_module
from seodang.softlabels import open as open_store
from seodang.softlabels.capture import capture, capture_each, make_shard, plan_shards
from seodang.softlabels.labelling import generator
from seodang.softlabels.shards import ENTROPY_STEP, HEAD_MASS_STEP
from seodang.teacher.local import LocalTeacher
from tiny import tiny_teacher
from tiny_store import LAYOUTS, config_of, sequences

POISON = 77  # a token whose embedding is not a number
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return LocalTeacher(tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The same teacher, but it says NaN from where it has seen one token."""
    path = tiny_teacher(tmp_path_factory.mktemp("poisoned"), tie_embeddings=False)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return LocalTeacher(path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 60)


def clean(count, **options):
    """Sequences without the poisonous token."""
    found = sequences(count, **options)
    for item in found:
        item.token_ids[item.token_ids == POISON] = POISON + 1
    return found


def identity(path):
    """What would be another if a shard were made again."""
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in path.glob("*.parquet")}


def content(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ["top-k", "residual", "sampled", "head-tail"])
def test_the_labels_are_the_teachers(teacher, tmp_path, estimator, layout):
    """Against unpadded float64 softmax of each sequence alone: catches shifts and padding."""
    items, config = sequences(9), config_of(estimator, layout=layout)
    capture(teacher, items, config, tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert store.header.teacher == teacher.fingerprint
    assert store.verify() == []
    for item, found in zip(items, store, strict=True):
        assert (found.document_id, found.digest) == (item.document_id, item.digest)
        ids = torch.from_numpy(item.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            p = torch.softmax(teacher.model.model(ids).logits[0].double(), -1).numpy()
        assert (np.diff(found.offsets)[np.setdiff1d(np.arange(len(p)), item.labelled)] == 0).all()
        entropy = -(p * np.log(p)).sum(1)[item.labelled]
        np.testing.assert_allclose(found.entropy, entropy, atol=ENTROPY_STEP / 2 + 1e-3)
        for index, position in enumerate(item.labelled):
            part = slice(found.offsets[position], found.offsets[position + 1])
            chosen, weight, row = found.ids[part], found.weights[part], p[position]
            if estimator in ("top-k", "residual"):
                np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(-row)[:5]))
                np.testing.assert_allclose(weight, row[chosen], rtol=0.13)  # a level further
            elif estimator == "sampled":
                np.testing.assert_allclose(weight * 12, np.rint(weight * 12), atol=1e-4)
                assert weight.sum() == pytest.approx(1, abs=1e-5)
            else:
                head = np.flatnonzero(row >= 0.05)
                assert np.isin(head, chosen).all()
                exact = row[chosen] >= 0.05
                np.testing.assert_allclose(weight[exact], row[chosen][exact], rtol=0.25)
                assert (weight[~exact] == np.float32(0.05)).all()
                mass = row[head].sum()
                assert found.head_mass[index] == pytest.approx(mass, abs=HEAD_MASS_STEP / 2 + 1e-3)


def test_inputs_are_labelled_too_if_asked_for(teacher, tmp_path):
    """As if every position had been wanted; but what nobody answers is still refused."""
    items = sequences(5)
    asked = SoftLabelsConfig(estimator="top-k", k=4, inputs=True)
    plain = SoftLabelsConfig(estimator="top-k", k=4)
    whole = [labelled_throughout(item) for item in items]
    assert any(len(item.labelled) < len(item.token_ids) for item in items)
    capture(teacher, items, asked, tmp_path / "asked")
    capture(teacher, whole, plain, tmp_path / "whole")
    for found, item in zip(open_store(tmp_path / "asked"), items, strict=True):
        np.testing.assert_array_equal(found.labelled, np.arange(len(item.token_ids)))
    one, other = content(tmp_path / "asked"), content(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.endswith(".parquet"))
    nothing = np.empty(0, np.int32)
    empty = [TokenSequence("no answer", items[0].token_ids, nothing)]
    with pytest.raises(InputError, match="no answer"):
        capture(teacher, empty, asked, tmp_path / "empty")
    stores = {tmp_path / "one": asked, tmp_path / "two": plain}
    with pytest.raises(InputError, match=r"soft_labels\.inputs"):
        capture_each(teacher, items, stores)
    assert not list(tmp_path.glob("two*"))


def test_a_teacher_in_bfloat16_gives_labels_of_its_own(teacher, tmp_path):
    """Near those in float32, and another store: neither passes for the other."""
    half = LocalTeacher(teacher.directory, "bfloat16")
    items, config = sequences(5), SoftLabelsConfig(estimator="residual", k=8)
    made = [capture(one, items, config, tmp_path / one.precision) for one in (teacher, half)]
    assert [m.manifest.config["precision"] for m in made] == ["float32", "bfloat16"]
    one, other = open_store(made[0].path), open_store(made[1].path)
    assert one.header == other.header
    entropies = [np.concatenate([found.entropy for found in store]) for store in (one, other)]
    assert not np.array_equal(*entropies)
    np.testing.assert_allclose(*entropies, atol=ENTROPY_STEP)
    again = capture(half, items, config, tmp_path / "float32")
    assert again.digest == made[1].digest


def test_labels_are_not_shifted(teacher, tmp_path):
    """The label at t must not see token t+1: changing a token changes labels from there on."""
    (item,) = sequences(1, seed=5)
    changed = item.token_ids.copy()
    at = len(changed) // 2
    changed[at] = (changed[at] + 1) % 500
    everything = np.arange(len(changed), dtype=np.int32)
    for name, ids in (("a", item.token_ids), ("b", changed)):
        items = [TokenSequence("d", ids, everything)]
        capture(teacher, items, config_of("top-k"), tmp_path / name)
    a, b = (open_store(tmp_path / name)[0] for name in "ab")
    before = a.offsets[at]
    np.testing.assert_array_equal(a.ids[:before], b.ids[:before])
    assert not np.array_equal(a.ids[before : before + 5], b.ids[before : before + 5])


def test_killed_at_random_moments_it_gives_the_same_bytes(teacher, tmp_path):
    """SIGKILL to real processes, again and again until one gets through; shards are kept."""
    path = filter(None, [str(HERE), os.environ.get("PYTHONPATH")])
    result = subprocess.run(
        [sys.executable, HERE / "killed_capture.py", teacher.directory, tmp_path, "3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["wrong"] == []
    assert found["killed"] >= 3
    assert found["partial"] >= 1  # with some shards finished and others not
    assert found["files"] > 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_do_not_depend_on_when_and_by_whom_they_are_made(
    teacher, tmp_path, small_shards, layout
):
    config, items = SoftLabelsConfig(layout=layout), sequences(20)
    made = capture(teacher, items, config, tmp_path / "s")
    parts = [items[part] for part in plan_shards([len(s.labelled) for s in items])]
    header = open_store(tmp_path / "s").header
    order = random.sample(range(len(parts)), len(parts))
    for number in order[:4]:
        someone = LocalTeacher(teacher.directory)
        (data,) = make_shard(someone, parts[number], [(header, config)], lambda tokens: None)
        assert data == (made.path / f"labels-{number:05d}.parquet").read_bytes()


def test_stores_of_one_pass_are_those_of_their_own_captures(
    teacher, tmp_path, small_shards, monkeypatch
):
    configs = {
        "top-k": SoftLabelsConfig(estimator="top-k", k=5),
        "residual": SoftLabelsConfig(estimator="residual", k=40, layout="small"),
        "sampled": SoftLabelsConfig(estimator="sampled", draws=20),
        "head-tail": SoftLabelsConfig(),
        "another seed": SoftLabelsConfig(seed=1),
    }
    items, seen = sequences(20), []
    for name, config in configs.items():
        capture(teacher, items, config, tmp_path / "alone" / name)
    forward = CausalLM.hidden_states
    monkeypatch.setattr(
        CausalLM, "hidden_states", lambda self, s: seen.extend(s) or forward(self, s)
    )
    stores = {tmp_path / "one pass" / name: config for name, config in configs.items()}
    capture_each(teacher, items, stores)
    assert len(seen) == len(items)
    for name in configs:
        assert content(tmp_path / "one pass" / name) == content(tmp_path / "alone" / name)


def test_each_store_of_a_pass_resumes_by_itself(teacher, tmp_path, small_shards, monkeypatch):
    items = sequences(20)
    stores = {
        tmp_path / "together" / "a": SoftLabelsConfig(),
        tmp_path / "together" / "b": SoftLabelsConfig(estimator="top-k"),
    }
    made = []

    def stop_at_the_third(tokens):
        made.append(tokens)
        if len(made) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_each(teacher, items, stores, shard_made=stop_at_the_third)
    first, second = stores
    assert len(list(first.glob("*.parquet"))) == len(list(second.glob("*.parquet"))) == 2
    (second / "labels-00001.parquet").unlink()  # as if killed between the two files of a shard
    done = {f: f.stat().st_mtime_ns for f in first.glob("*.parquet")}
    shards = list(plan_shards([len(s.labelled) for s in items]))
    seen = []
    forward = CausalLM.hidden_states
    monkeypatch.setattr(
        CausalLM, "hidden_states", lambda self, s: seen.extend(s) or forward(self, s)
    )
    capture_each(teacher, items, stores)
    assert len(seen) == sum(len(items[shard]) for shard in shards[1:])
    assert done == {f: f.stat().st_mtime_ns for f in done}
    for out, config in stores.items():
        capture(teacher, items, config, tmp_path / "alone" / out.name)
        assert content(out) == content(tmp_path / "alone" / out.name)


def test_draws_follow_content_and_seed(teacher, tmp_path):
    items = sequences(6)
    for name, chosen, seed in (("a", items, 0), ("b", items[::-1], 0), ("c", items, 1)):
        capture(teacher, chosen, SoftLabelsConfig(seed=seed), tmp_path / name)
    a, b, c = ({s.digest: s.ids.tolist() for s in open_store(tmp_path / n)} for n in "abc")
    assert a == b
    assert a != c
    numbers = [generator(seed, item).random() for seed in (0, 1) for item in items]
    assert len(set(numbers)) == len(numbers)  # each sequence has its own
    twin = TokenSequence("another document", items[0].token_ids, items[0].labelled)
    assert generator(0, twin).random() == numbers[0]


def test_a_finished_store_is_not_made_again(teacher, tmp_path):
    made = capture(teacher, sequences(3), SoftLabelsConfig(), tmp_path / "s")
    before = identity(tmp_path / "s")
    idle = LocalTeacher(teacher.directory)
    again = capture(idle, sequences(3), SoftLabelsConfig(), tmp_path / "s")
    assert again.digest == made.digest
    assert identity(tmp_path / "s") == before
    assert "model" not in vars(idle)  # the weights were not even loaded


def unusable():
    """Two clean documents, each kind of unusable one, and clean ones again, with the reasons."""
    first, last = clean(6), clean(12, seed=1)[6:]
    nothing = np.empty(0, np.int32)
    long = np.zeros(1025, np.int32)
    poison = np.array([5, POISON, 6, 7], np.int32)
    bad = {
        "empty": (TokenSequence("empty", nothing, nothing), "empty: there is no token to label"),
        "unlabelled": (TokenSequence("unlabelled", long[:3], nothing), "empty"),
        "long": (TokenSequence("long", long, long[:1]), "1025 tokens, .* context holds 1024"),
        "nan": (TokenSequence("nan", poison, np.arange(4, dtype=np.int32)), "not finite"),
    }
    return first, bad, last


@pytest.mark.parametrize("name", ["empty", "unlabelled", "long"])
def test_what_no_teacher_can_label_is_refused_before_any_work(poisoned, tmp_path, name):
    first, bad, last = unusable()
    item, reason = bad[name]
    with pytest.raises(InputError, match=f"document {name}: {reason}"):
        capture(poisoned, [*first, item, *last], SoftLabelsConfig(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("estimator", ["top-k", "residual", "sampled", "head-tail"])
def test_broken_probabilities_stop_it_and_earlier_shards_are_kept(
    poisoned, tmp_path, small_shards, estimator, capsys
):
    first, bad, last = unusable()
    items = [*first, bad["nan"][0], *last]
    config = config_of(estimator)
    with pytest.raises(WorkFailed, match=r"document nan: .*not finite.*shards are kept"):
        capture(poisoned, items, config, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()
    kept = identity(tmp_path / "s")
    assert kept
    with pytest.raises(WorkFailed, match="document nan"):  # again, and nothing is made twice
        capture(poisoned, items, config, tmp_path / "s")
    skip = config.model_copy(update={"unusable": "skip"})
    made = capture(poisoned, items, skip, tmp_path / "s")  # as the message advises
    assert kept.items() <= identity(made.path).items()
    assert "left out: document nan: the teacher's probabilities are not finite" in (
        capsys.readouterr().err
    )
    assert [s.document_id for s in open_store(made.path)] == [
        s.document_id for s in items if s.document_id != "nan"
    ]


def test_skipped_documents_are_listed_and_never_labelled(
    poisoned, tmp_path, small_shards, capsys, monkeypatch
):
    first, bad, last = unusable()
    items = [*first, *(item for item, _ in bad.values()), *last]
    config = SoftLabelsConfig(unusable="skip")
    made = capture(poisoned, items, config, tmp_path / "s")
    listed = made.manifest.summary["skipped"]
    assert [entry["document"] for entry in listed] == list(bad)
    said = capsys.readouterr().err
    for entry in listed:
        assert f"left out: document {entry['document']}: {entry['reason']}" in said
    store = open_store(made.path)
    assert [s.digest for s in store] == [s.digest for s in first + last]
    assert store.verify() == []
    assert store.num_tokens == sum(len(s.labelled) for s in first + last)
    assert made.manifest.summary["sequences"] == len(store)

    # Stopped before its last shard, it goes on to the same bytes and the same list.
    def fails(file, data):
        if file.name == "labels-00002.parquet":
            raise OSError("synthetic crash")
        return write_atomically(file, data)

    monkeypatch.setattr(capture_module, "write_atomically", fails)
    with pytest.raises(OSError, match="synthetic"):
        capture(poisoned, items, config, tmp_path / "t")
    assert [f.name for f in sorted((tmp_path / "t").glob("*.parquet"))] == [
        "labels-00000.parquet",
        "labels-00001.parquet",
    ]
    monkeypatch.undo()
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 60)
    capture(poisoned, items, config, tmp_path / "t")
    assert content(tmp_path / "t") == content(made.path)


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_left_out_does_not_pass_for_whole(poisoned, tmp_path, monkeypatch, finished):
    """With a recipe that refuses, a store of one that skips is none."""
    first, bad, _ = unusable()
    items = [*first, bad["nan"][0]]
    skip = SoftLabelsConfig(unusable="skip")
    if finished:
        capture(poisoned, items, skip, tmp_path / "s")
    else:
        monkeypatch.delattr(Draft, "finish")
        with pytest.raises(AttributeError):
            capture(poisoned, items, skip, tmp_path / "s")
        monkeypatch.undo()
    with pytest.raises(WorkFailed, match=r"document nan: .*left it out"):
        capture(poisoned, items, SoftLabelsConfig(), tmp_path / "s")
    assert len(open_store(capture(poisoned, items, skip, tmp_path / "s").path)) == len(first)


def test_nothing_usable_at_all(poisoned, teacher, tmp_path):
    _, bad, _ = unusable()
    config = SoftLabelsConfig(unusable="skip")
    for _ in range(2):
        with pytest.raises(WorkFailed, match=r"nothing could be labelled.*empty"):
            capture(poisoned, [item for item, _ in bad.values()], config, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()
    with pytest.raises(InputError, match="nothing to capture"):
        capture(teacher, [], config, tmp_path / "t")


@pytest.mark.parametrize(
    ("shard_tokens", "shards", "labelled"),
    [(100, 512, 57), (10, 5, 200), (1, 512, 3), (10**9, 512, 9)],
)
def test_shards_cover_every_sequence_once(monkeypatch, shard_tokens, shards, labelled):
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(capture_module, "SHARDS", shards)
    counts = np.random.default_rng(0).integers(0, 70, labelled).tolist()
    found = list(plan_shards(counts))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(labelled))
    assert all(sum(counts[s]) >= shard_tokens for s in found[:-1])
    assert len(found) <= shards + 1


def test_no_tensor_of_the_whole_vocabulary_and_length(teacher, tmp_path, monkeypatch):
    """The head is never applied to more rows than a chunk holds."""
    import seodang.causal_lm as module

    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * 4 * teacher.vocab_size)
    rows = []
    original = CausalLM.logits
    monkeypatch.setattr(
        CausalLM, "logits", lambda self, h: (rows.append(len(h)), original(self, h))[1]
    )
    capture(teacher, sequences(12), SoftLabelsConfig(), tmp_path / "store")
    assert rows
    assert max(rows) <= 16
