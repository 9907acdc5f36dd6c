"""The release: weights in every format, cards, data, evaluation, API description and signature.

It is the last stage of a run, and only a student that passed the gate gets here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, FileEntry, begin, sha256_file, write_atomically, write_json
from seodang.corpus.build import read_documents, read_sequences
from seodang.errors import WorkFailed
from seodang.progress import say
from seodang.recipe import Quantization, ReleaseConfig, ReleasedDataConfig
from seodang.release import bom, cards, data, gguf, keys, openapi, parity, signature
from seodang.release.facts import METRICS, Facts
from seodang.training.log import EVENTS, LOG, SPEED

API = "api/openapi.json"
BOM = "bom.cdx.json"
DATA = "data"
DATA_CARD = "DATA_CARD.md"
EVALUATION = "evaluation"
MODEL_CARD = "README.md"
PARITY = "gguf-parity.json"
SETTINGS = "recipe.json"
TRAINING_SUMMARY = "TRAINING_DATA.md"
_WORK = ".build"
# Of the student; the report shows what is in it.
_TRAINING_LOG = {LOG, SPEED, EVENTS}


def build(
    out: Path,
    *,
    config: ReleaseConfig,
    student: Artifact,
    evaluation: Artifact,
    corpus: Artifact,
    soft_labels: Artifact,
    key: Path,
    schemas: openapi.Schemas | None = None,
) -> Artifact:
    """Build and sign the release in ``out``, resuming what an earlier, killed build left there.

    ``schemas`` are the JSON schemas of the answers that the student was trained to give, by the
    name of the task; the description of its API shows how they are asked for.

    Raises ``WorkFailed`` if the gate was not passed, if a file of the student or the evaluation is
    not what its manifest says, if an unquantised GGUF does not agree with PyTorch or a quantised
    one loses more than the recipe allows, or if data is asked for and no licence allows it; and
    ``InputError`` if the key cannot be used or llama.cpp does not know the model.
    """
    metrics = json.loads((evaluation.path / METRICS).read_bytes())
    if metrics["gate"]["passed"] is not True:
        raise WorkFailed(f"{evaluation.path}: the gate was not passed, so nothing is released")
    public_key = keys.fingerprint(keys.public_key_pem(key))
    draft = begin(
        out,
        "release",
        {
            **config.model_dump(),
            "public_key": public_key,
            "converter": str(gguf.CONVERTER),
            "schemas": dict(schemas or {}),
        },
        {
            "student": student.digest,
            "evaluation": evaluation.digest,
            "corpus": corpus.digest,
            "soft_labels": soft_labels.digest,
        },
    )
    if isinstance(draft, Artifact):
        return draft
    work = draft.path / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)

    _copy(student, draft.path, work, without=_TRAINING_LOG)
    _copy(evaluation, draft.path / EVALUATION, work)
    ggufs = {q: draft.path / f"{config.name}-{q}.gguf" for q in config.quantizations}
    # Converted in `work` and moved here whole, so that what an earlier build left is complete.
    if missing := {q: work / file.name for q, file in ggufs.items() if not file.exists()}:
        say(f"Converting the student to GGUF: {', '.join(missing)}")
        card = cards.gguf_metadata(config)
        gguf.convert(student.path, missing, name=config.name, card=card)
        for quantization, made in missing.items():
            made.replace(ggufs[quantization])
    agreement = _parity(draft.path, student, ggufs, corpus, config)

    weights = [*sorted(draft.path.glob("model*.safetensors")), *ggufs.values()]
    facts = Facts(
        config=config,
        student=student,
        evaluation=evaluation,
        corpus=corpus,
        soft_labels=soft_labels,
        weights=[_entry(file) for file in weights],
        parity=agreement,
        portion=None,
        key=public_key,
    )
    if config.data is not None:
        facts = replace(facts, portion=_data(draft.path / DATA, work / DATA, config.data, facts))
    stages = {"corpus": corpus, "soft-labels": soft_labels, "student": student}
    stages["evaluation"] = evaluation
    texts = {
        MODEL_CARD: cards.model_card(facts),
        DATA_CARD: cards.data_card(facts),
        TRAINING_SUMMARY: cards.training_summary(facts),
        BOM: bom.bill_of_materials(facts),
    }
    for name, text in texts.items():
        write_atomically(draft.path / name, text.encode())
    write_json(draft.path / SETTINGS, {k: v.manifest.config for k, v in stages.items()})
    (draft.path / API).parent.mkdir(exist_ok=True)
    write_json(draft.path / API, openapi.describe(facts, schemas or {}))

    def sign(manifest: bytes) -> None:
        signature.sign(draft.path, manifest, key, name=config.name, work=work)

    return draft.finish(
        sources=facts.sources,
        summary={"name": config.name, "license": config.license},
        measured=[MODEL_CARD, BOM, PARITY, *_below(draft.path, EVALUATION)],
        temporary=[_WORK],
        sign=sign,
    )


def _copy(artifact: Artifact, target: Path, work: Path, without: set[str] | None = None) -> None:
    """Copy the files of an artifact, each whole and as its manifest says."""
    for entry in artifact.manifest.files:
        if entry.path in (without or ()):
            continue
        copy = work / "copy"
        shutil.copyfile(artifact.path / entry.path, copy)
        if sha256_file(copy) != entry.sha256:
            raise WorkFailed(
                f"{artifact.path / entry.path}: is not the file that was made (sha256); "
                f"delete {artifact.path} and run again"
            )
        (target / entry.path).parent.mkdir(parents=True, exist_ok=True)
        copy.replace(target / entry.path)


def _parity(
    release: Path,
    student: Artifact,
    ggufs: dict[Quantization, Path],
    corpus: Artifact,
    config: ReleaseConfig,
) -> dict[str, Any] | None:
    """What gguf-parity.json holds, measured unless an earlier build did; None without GGUF."""
    if not ggufs:
        return None
    file = release / PARITY
    if not file.exists():
        report = parity.measure(
            student.path,
            ggufs,
            [sequence.token_ids.tolist() for sequence in read_sequences(corpus.path, "held_out")],
            read_documents(corpus.path, "held_out"),
            positions=config.parity_positions,
        )
        parity.require(report, config.max_quantization_kl)
        for what in ("tokenization", "chat_template"):
            if count := report[what]["mismatches"]:
                say(f"Note: llama.cpp's {what} differs on {count} held-out documents: {PARITY}")
        write_json(file, report)
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def _data(target: Path, work: Path, config: ReleasedDataConfig, facts: Facts) -> dict[str, Any]:
    """What selection.json holds of the released data, which is made in ``work`` and moved whole."""
    say("Choosing the part of the training data that is released")
    work.mkdir()
    portion = data.write(work, config, facts.corpus, facts.soft_labels, facts.teachers)
    card = cards.data_set_card(replace(facts, portion=portion))
    write_atomically(work / "README.md", card.encode())
    shutil.rmtree(target, ignore_errors=True)
    work.replace(target)
    return portion


def _entry(file: Path) -> FileEntry:
    return FileEntry(path=file.name, size=file.stat().st_size, sha256=sha256_file(file))


def _below(root: Path, folder: str) -> list[str]:
    return [f.relative_to(root).as_posix() for f in (root / folder).rglob("*") if f.is_file()]
