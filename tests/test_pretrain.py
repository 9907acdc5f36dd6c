"""Pretraining: batches, balance, losses, and exact resumption, on a tiny A.X K1."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from seodang.artifact import Artifact
from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.pretraining.balance import Balance, balance_loss
from seodang.foundation.pretraining.batches import batch, cut, plan_pretraining
from seodang.foundation.pretraining.config import (
    BalancingConfig,
    PretrainingConfig,
    StageConfig,
)
from seodang.foundation.pretraining.held_out import nats_per_byte
from seodang.foundation.pretraining.module import Pretraining
from seodang.foundation.pretraining.mtp import shifted
from seodang.foundation.pretraining.pretrain import REPORT, ROUTING, pretrain
from seodang.foundation.pretraining.tokens import TokenStore, tokenize_raw
from seodang.training.log import LOG, read_rows
from seodang.training.parallel import Processes
from tiny_foundation import CONFIG, MODEL, tiny_tokens

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tokenizer and the tokens of a tiny synthetic corpus."""
    return tiny_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def base(made, tmp_path_factory):
    tokenizer, tokens = made
    return pretrain(CONFIG, MODEL, tokens, tokenizer, tmp_path_factory.mktemp("base") / "base")


def changed(**keys):
    return CONFIG.model_copy(update=keys)


# Tokens


def test_tokens_are_the_documents_between_boundaries(made):
    from seodang.causal_lm import load_tokenizer
    from seodang.corpus.raw.reading import read_raw

    tokenizer, tokens = made
    encoder = load_tokenizer(tokenizer.path)
    store = TokenStore(tokens, "train")
    documents = list(read_raw(tokens.path.parent / "raw", "train"))
    assert len(store) == len(documents)
    assert len(list(tokens.path.glob("train-*.bin"))) > 1  # several shards
    for i in (0, 1, len(store) // 2, len(store) - 1):
        ids = store.tokens(i)
        assert ids[0] == ids[-1] == encoder.bos_token_id
        assert encoder.decode(ids[1:-1]) == documents[i].text
        assert store.bytes[i] == len(documents[i].text.encode())
        assert store.languages[i] == documents[i].language


def test_tokenizing_goes_on_after_the_last_finished_shard(made, tmp_path):
    import shutil

    tokenizer, tokens = made
    raw = Artifact.open(tokens.path.parent / "raw")
    whole = tokenize_raw(raw, tokenizer, tmp_path / "t", shard_tokens=4000)
    files = {f.name: f.read_bytes() for f in whole.path.iterdir()}
    shutil.rmtree(whole.path)
    seen = []

    def stop(*arguments):
        if len(seen) == 3:
            raise RuntimeError("synthetic crash")
        seen.append(arguments)
        return write(*arguments)

    from seodang.foundation.pretraining import tokens as module

    write = module._write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_write_shard", stop)
        with pytest.raises(RuntimeError, match="synthetic"):
            tokenize_raw(raw, tokenizer, tmp_path / "t", shard_tokens=4000)
    assert tokenize_raw(raw, tokenizer, tmp_path / "t", shard_tokens=4000).digest == whole.digest
    assert files == {f.name: f.read_bytes() for f in whole.path.iterdir()}


# Batches


@given(st.integers(2, 300), st.integers(1, 64))
def test_every_token_but_the_first_is_predicted_once(length, context):
    pieces = cut(0, length, context)
    predicted = [t for piece in pieces for t in range(piece.begin, piece.end)]
    assert predicted == list(range(1, length))
    assert all(piece.end - piece.begin <= context for piece in pieces)


def test_a_batch_predicts_the_tokens_that_follow(made):
    store = TokenStore(made[1], "train")
    pieces = [*cut(3, int(store.lengths[3]), 7)[:2], *cut(5, int(store.lengths[5]), 9)[:1]]
    found = batch(store, pieces)
    assert sum(found.lengths) == len(found.ids) == len(found.targets)
    for piece, alone in zip(pieces, found.apart(), strict=True):
        tokens = store.tokens(piece.document)
        assert alone.ids.tolist() == tokens[piece.begin - 1 : piece.end - 1].tolist()
        assert alone.targets.tolist() == tokens[piece.begin : piece.end].tolist()
        assert alone.positions.tolist() == list(range(piece.end - piece.begin))
        assert alone.documents == [store.ids[piece.document]]


def test_stages_have_their_context_and_mixture(made):
    store = TokenStore(made[1], "train")
    config = changed(
        tokens=20_000,
        stages=[
            StageConfig(share=0.75, context=8, mixture={"ko": 1, "en": 1}),
            StageConfig(share=0.25, context=16, mixture={"code": 3, "en": 1}),
        ],
    )
    steps = plan_pretraining(store, config, 16)
    sizes = [sum(piece.end - piece.begin for piece in step) for step in steps]
    assert sum(sizes) == 20_000
    assert max(sizes) <= config.batch_tokens
    first = [piece for step in steps for piece in step if piece.end - piece.begin <= 8]
    total = {"ko": 0, "en": 0, "code": 0}
    for step in steps:
        for piece in step:
            total[store.languages[piece.document]] += piece.end - piece.begin
    assert total == {"ko": 7500, "en": 8750, "code": 3750}
    assert len(first) < sum(map(len, steps))  # some are longer: the second stage's
    assert steps == plan_pretraining(store, config, 16)
    assert steps != plan_pretraining(store, config.model_copy(update={"seed": 1}), 16)


def test_one_epoch_takes_every_token_once(made):
    store = TokenStore(made[1], "train")
    steps = plan_pretraining(store, changed(tokens=None), 32)
    taken = sorted(
        (piece.document, token)
        for step in steps
        for piece in step
        for token in range(piece.begin, piece.end)
    )
    assert taken == [(d, t) for d, n in enumerate(store.lengths) for t in range(1, n)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_tokens": 10**9}, "less than one batch"),
        ({"stages": [StageConfig(share=1, context=99)]}, "context is 99"),
        ({"stages": [StageConfig(share=1, mixture={"fr": 1})]}, "'fr' is neither"),
    ],
)
def test_impossible_plans_are_refused(made, tmp_path, keys, message):
    tokenizer, tokens = made
    with pytest.raises(InputError, match=message):
        pretrain(changed(**keys), MODEL, tokens, tokenizer, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_vocabulary_below_the_tokenizers_is_refused(made, tmp_path):
    tokenizer, tokens = made
    small = ModelConfig(**{**MODEL.model_dump(), "vocabulary": 300})
    with pytest.raises(InputError, match="vocabulary"):
        pretrain(CONFIG, small, tokens, tokenizer, tmp_path / "base")


def test_shares_of_stages_must_be_a_whole():
    with pytest.raises(ValueError, match=r"add up to 0\.5"):
        PretrainingConfig(stages=[StageConfig(share=0.5)])


# Losses


def module(mtp_layers=0, **balancing):
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL.model_dump(), "mtp_layers": mtp_layers})
    made = Pretraining(config, MODEL.vocabulary, 0.3)
    made.balance = Balance(made, BalancingConfig(**balancing), 100, ALONE)
    return made


def test_the_loss_is_that_of_transformers_document_by_document(made):
    store = TokenStore(made[1], "train")
    ours = module(method="none")
    pieces = [cut(i, int(store.lengths[i]), 32)[0] for i in (0, 3, 6, 9)]
    sums = ours(batch(store, pieces))
    ours.model.set_attn_implementation("sdpa")
    expected = 0.0
    for piece in pieces:
        ids = torch.from_numpy(store.tokens(piece.document, 0, piece.end))[None]
        logits = ours.model(ids[:, :-1]).logits[0]
        expected += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert float(sums.total) == pytest.approx(expected, rel=1e-5)
    assert float(sums.cross_entropy) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_sequence_loss_is_that_of_the_paper(seed, lengths):
    """Against equations 17 to 20 of DeepSeek-V3, written out in float64."""
    generator = torch.Generator().manual_seed(seed)
    experts, top_k, tokens = 6, 2, sum(lengths)
    logits = torch.randn(tokens, experts, generator=generator)
    chosen = torch.zeros(tokens, experts).scatter_(1, logits.topk(top_k).indices, 1.0)
    expected, start = 0.0, 0
    for length in lengths:
        s = logits[start : start + length].double().sigmoid()
        f = chosen[start : start + length].double().sum(0) * experts / (top_k * length)
        p = (s / s.sum(1, keepdim=True)).mean(0)
        expected += float((f * p).sum()) * length
        start += length
    assert float(balance_loss(logits, chosen, lengths)) == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_shifted_targets_stay_within_their_sequence(lengths):
    targets = torch.arange(100, 100 + sum(lengths))
    found, start = shifted(targets, lengths).tolist(), 0
    for length in lengths:
        part = targets[start : start + length].tolist()
        assert found[start : start + length] == [*part[1:], -100]
        start += length


def test_the_mtp_layer_predicts_the_token_after_the_next(made):
    """It is told the next token, and predicts the one after, which it is not told."""
    store = TokenStore(made[1], "train")
    ours = module(mtp_layers=1, method="none")
    one = batch(store, cut(0, int(store.lengths[0]), 32)[:1])
    sums = ours(one)
    sums.total.backward()
    assert all(p.grad is not None for p in ours.parameters())
    sums = type(sums)(*(term.detach() for term in sums))
    assert float(sums.total) == pytest.approx(
        float(sums.cross_entropy) + 0.3 * float(sums.mtp_loss), rel=1e-5
    )
    with torch.no_grad():
        last = one.targets.clone()
        last[-1] = (last[-1] + 1) % 50  # is the target of the last but one, and of no other
        other = ours(type(one)(one.ids, one.positions, last, one.lengths, one.documents))
        for mtp in ours.mtp:
            torch.nn.init.zeros_(mtp.norm.weight)
        blind = ours(one)
    assert float(other.mtp_loss) != float(sums.mtp_loss)
    uniform = (sum(one.lengths) - 1) * np.log(MODEL.vocabulary)
    assert float(blind.mtp_loss) == pytest.approx(uniform, rel=1e-5)


# Balance


def test_the_router_bias_chooses_and_does_not_weigh():
    ours = module()
    router = ours.balance.routers[0]
    tokens = torch.randn(64, MODEL.hidden_size)
    with torch.no_grad():
        router.e_score_correction_bias[3] = 5.0
        logits, weights, chosen = router(tokens)
    assert (chosen == 3).any(1).all()
    scores = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True) * 2.5)


def test_a_step_moves_the_bias_against_the_load(made):
    store = TokenStore(made[1], "train")
    ours = module(rate=0.01, fold_from=0.5, fold_until=0.75)
    pieces = [cut(i, int(store.lengths[i]), 32)[0] for i in range(20)]
    ours(batch(store, pieces))
    loads = ours.balance._found_LE[:, :-1].clone()
    tokens = sum(piece.end - piece.begin for piece in pieces)
    assert loads.sum(1).tolist() == [tokens * MODEL.experts_per_token] * MODEL.moe_layers
    figures = ours.balance.after_step(1)
    for layer, router in enumerate(ours.balance.routers):
        expected = 0.01 * (loads[layer].mean() - loads[layer]).sign().float()
        torch.testing.assert_close(router.e_score_correction_bias, expected)
        share = loads[layer] / loads[layer].sum()
        assert figures[f"load_max/{layer + 1}"] == pytest.approx(float(share.max()) * 8)
        assert figures[f"dead/{layer + 1}"] == int((loads[layer] == 0).sum())


def test_the_bias_is_folded_away_while_the_loss_takes_over(made):
    store = TokenStore(made[1], "train")
    ours = module(rate=0.01, fold_from=0.2, fold_until=0.4, weight=0.001, fold_weight=0.1)
    one = batch(store, cut(0, int(store.lengths[0]), 32)[:1])
    sizes, weights = [], []
    for step in range(1, 51):
        weights.append(ours.balance.loss_weight)
        ours(one)
        ours.balance.after_step(step)
        sizes.append(
            max(float(r.e_score_correction_bias.abs().max()) for r in ours.balance.routers)
        )
    assert sizes[19] > 0
    np.testing.assert_allclose(sizes[19:40], np.linspace(sizes[19], 0, 21), atol=1e-6)
    assert sizes[39:] == [0.0] * 11
    assert weights[:21] == [0.001] * 21
    assert weights[40:] == [0.1] * 10


@pytest.mark.parametrize("method", ["bias", "sequence"])
def test_only_the_sequence_wise_loss_looks_at_each_sequence_alone(made, method):
    store = TokenStore(made[1], "train")
    ours = module(method=method)
    one = batch(store, [cut(i, int(store.lengths[i]), 32)[0] for i in (0, 3, 6, 9)])
    seen = []
    for router in ours.balance.routers:
        router.register_forward_hook(lambda *given: seen.append(given[2]))
    sums = ours(one)
    lengths = one.lengths if method == "sequence" else [sum(one.lengths)]
    expected = sum(
        float(balance_loss(logits, torch.zeros_like(logits).scatter_(1, chosen, 1.0), lengths))
        for logits, _, chosen in seen
    )
    assert float(sums.balance_loss) == pytest.approx(expected, rel=1e-5)


# The stage


def test_pretraining_lowers_the_loss_and_gives_a_plain_model(base, made):
    _, tokens = made
    rows = read_rows(base.path / LOG)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 1
    assert base.verify() == []
    model = AutoModelForCausalLM.from_pretrained(base.path)
    assert type(model).__name__ == "AXK1ForCausalLM"
    assert all(float(b.abs().max()) == 0 for n, b in model.named_buffers() if "correction" in n)
    from safetensors import safe_open

    with safe_open(base.path / "model.safetensors", "pt") as file:
        assert not [name for name in set(file.keys()) if "correction" in name or "mtp" in name]
    report = json.loads((base.path / REPORT).read_text())
    found = nats_per_byte(model, TokenStore(tokens, "held-out"))
    assert found == pytest.approx(report["held_out_nats_per_byte"], rel=1e-6)
    assert set(found) == {"ko", "en", "code", "all"}
    assert report["routing"]["load_max"] >= 1
    assert "busiest expert" in (base.path / ROUTING).read_text()


def test_held_out_loss_is_counted_by_hand(base, made):
    store = TokenStore(made[1], "held-out")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    total, size = 0.0, 0
    for i in range(len(store)):
        for piece in cut(i, int(store.lengths[i]), 32):
            ids = torch.from_numpy(store.tokens(i, piece.begin - 1, piece.end))[None]
            with torch.no_grad():
                log_p = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
            total -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        size += int(store.bytes[i])
    found = nats_per_byte(model, store, most=10**9)
    assert found["all"] == pytest.approx(total / size, rel=1e-5)


KILLED = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tiny_foundation import CONFIG, MODEL
from seodang.artifact import Artifact
from seodang.foundation.pretraining.pretrain import pretrain
folder = Path(sys.argv[2])
config = CONFIG.model_copy(update={"checkpoint_steps": 3})
pretrain(config, MODEL, Artifact.open(folder / "tokens"), Artifact.open(folder / "tokenizer"),
         Path(sys.argv[3]))
"""


def test_kill_9_changes_nothing(base, made, tmp_path):
    tokenizer, tokens = made
    out = tmp_path / "base"
    arguments = [str(Path(__file__).parent), str(tokens.path.parent), str(out)]
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while job.poll() is None and not (out / "checkpoints" / "step-00000006").exists():
            time.sleep(0.005)
        assert job.poll() is None
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not (out / "manifest.json").exists()
    resumed = pretrain(changed(checkpoint_steps=3), MODEL, tokens, tokenizer, out)
    assert resumed.digest == base.digest


def test_a_finished_model_is_not_made_again(base, made):
    tokenizer, tokens = made
    before = (base.path / "manifest.json").stat().st_mtime_ns
    assert pretrain(CONFIG, MODEL, tokens, tokenizer, base.path).digest == base.digest
    assert (base.path / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "muon"},
        {"precision": "bfloat16"},
        {"balancing": BalancingConfig(method="sequence")},
        {"gradient_checkpointing": True},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_other_ways_of_training_learn_too(base, made, tmp_path, keys):
    tokenizer, tokens = made
    other = pretrain(changed(**keys), MODEL, tokens, tokenizer, tmp_path / "base")
    rows, expected = read_rows(other.path / LOG), read_rows(base.path / LOG)
    assert rows[-1]["cross_entropy"] == pytest.approx(expected[-1]["cross_entropy"], rel=0.15)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 1


def test_multi_token_prediction_is_trained_and_left_out_of_the_release(base, made, tmp_path):
    tokenizer, tokens = made
    model = ModelConfig(**{**MODEL.model_dump(), "mtp_layers": 1})
    other = pretrain(CONFIG, model, tokens, tokenizer, tmp_path / "base")
    rows = read_rows(other.path / LOG)
    assert rows[-1]["mtp_loss"] < rows[0]["mtp_loss"] - 1
    assert f"load_max/{MODEL.moe_layers + 1}" in rows[0]  # its experts are balanced too
    shapes = {
        n: p.shape for n, p in AutoModelForCausalLM.from_pretrained(base.path).named_parameters()
    }
    found = AutoModelForCausalLM.from_pretrained(other.path)
    assert {n: p.shape for n, p in found.named_parameters()} == shapes
