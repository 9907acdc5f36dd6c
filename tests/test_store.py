"""Capture and store: what is written is what the teacher said, and changes are noticed."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from seodang.artifact import Draft
from seodang.causal_lm import CausalLM, model_fingerprint, tokenizer_fingerprint
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, WorkFailed
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels import capture as capture_module
from seodang.softlabels import open as open_store
from seodang.softlabels.capture import capture, plan_shards
from tiny import tiny_teacher

ESTIMATORS = {
    "top-k": {"k": 8},
    "residual": {"k": 8},
    "sampled": {"draws": 40},
    "head-tail": {"head": 4, "draws": 4},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny_teacher(tmp_path_factory.mktemp("teacher"))
    return CausalLM.load(folder), model_fingerprint(folder)


def sequences(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        ids = rng.integers(0, 500, rng.integers(2, longest)).astype(np.int32)
        some = rng.random(len(ids)) < (1.0 if number % 2 else 0.5)
        some[0] = True
        out.append(TokenSequence(f"doc{number}", ids, np.flatnonzero(some).astype(np.int32)))
    return out


def make(teacher, out, config=None, items=None):
    model, fingerprint = teacher
    items = sequences(12) if items is None else items
    return capture(model, fingerprint, items, config or SoftLabelsConfig(), out)


@pytest.mark.parametrize("layout", ["fast", "small"])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_stored_weights_are_the_teachers(teacher, tmp_path, estimator, layout):
    items = sequences(9)
    config = SoftLabelsConfig(estimator=estimator, layout=layout, **ESTIMATORS[estimator])
    make(teacher, tmp_path / "store", config, items)
    store = open_store(tmp_path / "store")
    assert store.estimator == estimator
    assert store.num_tokens == sum(len(s.labelled) for s in items)
    assert store.verify() == []
    assert [s.document_id for s in store] == [s.document_id for s in items]
    for item, found in zip(items, store, strict=True):
        np.testing.assert_array_equal(found.token_ids, item.token_ids)
        ids = torch.from_numpy(item.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            p = torch.softmax(teacher[0].model(ids).logits[0].double(), -1).numpy()
        assert found.offsets.shape == (len(item.token_ids) + 1,)
        assert set(np.flatnonzero(np.diff(found.offsets))) == set(item.labelled.tolist())
        for index, position in enumerate(item.labelled):
            part = slice(found.offsets[position], found.offsets[position + 1])
            chosen, weight = found.ids[part], found.weights[part]
            row = p[position]  # the distribution of the token after token `position`
            entropy = -(row * np.log(row)).sum()
            assert found.entropy[index] == pytest.approx(entropy, rel=1e-3)
            if estimator in ("top-k", "residual"):
                np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(-row)[:8]))
                np.testing.assert_allclose(weight, row[chosen], rtol=1e-3)
            elif estimator == "sampled":
                counts = weight * 40
                np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
                assert weight.sum() == pytest.approx(1, abs=1e-5)
            else:
                np.testing.assert_allclose(weight[:4], np.sort(row)[::-1][:4], rtol=1e-3)
                tail = 1 - np.sort(row)[::-1][:4].sum()
                assert weight[4:].sum() == pytest.approx(tail, rel=1e-3)
                np.testing.assert_allclose(found.p[part], row[chosen], rtol=1e-3)


def test_labels_are_not_shifted(teacher, tmp_path):
    """The label at t must not see token t+1: changing a token changes labels from there on."""
    item = sequences(1, seed=5)[0]
    changed = item.token_ids.copy()
    at = len(changed) // 2
    changed[at] = (changed[at] + 1) % 500
    everything = np.arange(len(changed), dtype=np.int32)
    config = SoftLabelsConfig(estimator="top-k")
    stores = []
    for name, ids in (("a", item.token_ids), ("b", changed)):
        make(teacher, tmp_path / name, config, [TokenSequence("d", ids, everything)])
        stores.append(open_store(tmp_path / name)[0])
    a, b = stores
    np.testing.assert_allclose(a.entropy[:at], b.entropy[:at], rtol=1e-5)
    assert abs(a.entropy[at] - b.entropy[at]) > 1e-4


def test_same_bytes_again_and_after_a_crash(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 60)
    first = make(teacher, tmp_path / "a")
    assert len(list(first.path.glob("labels-*.parquet"))) > 2

    def fails(*arguments):
        if arguments[0].name == "labels-00002.parquet":
            raise OSError("synthetic crash")
        return written(*arguments)

    written = capture_module.write_shard
    monkeypatch.setattr(capture_module, "write_shard", fails)
    with pytest.raises(OSError, match="synthetic"):
        make(teacher, tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*.parquet")}
    assert len(kept) == 2
    monkeypatch.setattr(capture_module, "write_shard", written)
    second = make(teacher, tmp_path / "b")
    assert second.digest == first.digest
    for name, moment in kept.items():  # finished shards are not made again
        assert (tmp_path / "b" / name).stat().st_mtime_ns == moment
    for file in first.manifest.files:
        assert (first.path / file.path).read_bytes() == (second.path / file.path).read_bytes()


def test_draws_follow_the_content_not_the_order(teacher, tmp_path):
    items = sequences(6)
    make(teacher, tmp_path / "a", None, items)
    make(teacher, tmp_path / "b", None, items[::-1])
    a = {s.digest: s for s in open_store(tmp_path / "a")}
    for sequence in open_store(tmp_path / "b"):
        np.testing.assert_array_equal(sequence.draws, a[sequence.digest].draws)
        np.testing.assert_array_equal(sequence.ids, a[sequence.digest].ids)
    other = SoftLabelsConfig(seed=1)
    make(teacher, tmp_path / "c", other, items)
    assert any(not np.array_equal(s.ids, a[s.digest].ids) for s in open_store(tmp_path / "c"))


def rewrite(store, change):
    """Rewrite a shard and the manifest that vouches for it, as a careless tool would."""
    shard = store / "labels-00000.parquet"
    table = pq.read_table(shard)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), shard)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").unlink()
    draft = Draft(store, manifest["kind"], manifest["config"], manifest["inputs"])
    draft.finish(summary=manifest["summary"])


def shift_tokens(columns):
    columns["token_ids"][1] = [columns["token_ids"][1][-1], *columns["token_ids"][1][:-1]]


def shift_positions(columns):
    columns["labelled"][0] = [p + 1 for p in columns["labelled"][0]]


@pytest.mark.parametrize("change", [shift_tokens, shift_positions])
def test_shifted_tokens_or_positions_are_found(teacher, tmp_path, change):
    items = [TokenSequence("d", s.token_ids, s.labelled[:-1]) for s in sequences(4, longest=30)]
    items = [s for s in items if len(s.labelled)]
    make(teacher, tmp_path / "store", None, items)
    rewrite(tmp_path / "store", change)
    problems = open_store(tmp_path / "store").verify()
    assert any("digest" in problem for problem in problems)


def test_another_tokenizer_is_refused_with_the_reason(teacher, tmp_path):
    make(teacher, tmp_path / "store")
    store = open_store(tmp_path / "store")
    store.check_tokenizer(tokenizer_fingerprint(teacher[0].tokenizer))
    with pytest.raises(InputError, match="another tokenizer"):
        store.check_tokenizer("0" * 64)


def test_a_flipped_byte_is_found(teacher, tmp_path):
    make(teacher, tmp_path / "store")
    shard = tmp_path / "store" / "labels-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert any("sha256" in p for p in open_store(tmp_path / "store").verify())


@pytest.mark.parametrize("at", [0, 50, -20])
def test_a_damaged_shard_is_named(teacher, tmp_path, at):
    make(teacher, tmp_path / "store")
    shard = tmp_path / "store" / "labels-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[at:] = b"" if at else b"not parquet at all"
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"labels-00000\.parquet: cannot be read"):
        list(open_store(tmp_path / "store"))


def test_an_unfinished_store_does_not_open(teacher, tmp_path):
    make(teacher, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished artifact"):
        open_store(tmp_path / "store")


def test_broken_probabilities_name_the_document(teacher, tmp_path):
    model, fingerprint = teacher
    weight = model.head_VH.detach()
    saved = weight[7].clone()
    try:
        weight[7] = float("nan")
        with pytest.raises(WorkFailed, match="doc0"):
            capture(model, fingerprint, sequences(1), SoftLabelsConfig(), tmp_path / "store")
    finally:
        weight[7] = saved
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_empty_and_too_long_input_is_refused_before_any_work(teacher, tmp_path):
    with pytest.raises(InputError, match="nothing to capture"):
        make(teacher, tmp_path / "store", None, [])
    ids = np.zeros(teacher[0].max_length + 1, np.int32)
    with pytest.raises(InputError, match="context"):
        make(teacher, tmp_path / "store", None, [TokenSequence("long", ids, ids[:1])])
    assert not (tmp_path / "store").exists()


def test_shards_cover_every_sequence_once(monkeypatch):
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 100)
    labelled = np.random.default_rng(0).integers(1, 70, 57).tolist()
    shards = list(plan_shards(labelled))
    assert [i for s in shards for i in range(s.start, s.stop)] == list(range(57))
    assert all(sum(labelled[s]) >= 100 for s in shards[:-1])


def test_no_tensor_of_the_whole_vocabulary_and_length(teacher, tmp_path, monkeypatch):
    """The head is never applied to more rows than a chunk holds."""
    import seodang.causal_lm as module

    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * 4 * teacher[0].vocab_size)
    rows = []
    original = CausalLM.logits
    monkeypatch.setattr(
        CausalLM, "logits", lambda self, h: (rows.append(len(h)), original(self, h))[1]
    )
    make(teacher, tmp_path / "store")
    assert rows
    assert max(rows) <= 16


def test_moving_a_store_keeps_its_identity(teacher, tmp_path):
    artifact = make(teacher, tmp_path / "store")
    shutil.move(tmp_path / "store", tmp_path / "moved")
    assert open_store(tmp_path / "moved").artifact.digest == artifact.digest
