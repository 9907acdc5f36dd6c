"""The shipped recipe on its real documents and its real teacher, cut down to a minute."""

import json

import pytest

from seodang.corpus.build import read_documents
from seodang.errors import InputError
from seodang.packages import open_package
from seodang.recipe_file import load_recipe
from seodang.softlabels import open as open_store
from tiny_run import seodang

RECIPE = "recipes/customer-service.yaml"
SMALL = {
    "corpus.sources.0.max_tokens": 900,
    "corpus.train_tokens": 1500,
    "corpus.held_out_tokens": 300,
    "student.layers": 4,
    "student.batch_tokens": 256,
    "evaluation.prompts": '["My phone shows no signal."]',
    "evaluation.max_new_tokens": 4,
    "gate.beats": "{untrained: {}}",
    "release.quantizations": "[f16]",
    "release.parity_positions": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    try:
        for pin in load_recipe(RECIPE).packages():
            open_package(pin).close()
    except InputError:
        pytest.skip("needs the fetched packages of the recipe (make fetch)")
    out = tmp_path_factory.mktemp("cs") / "out"
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    done = seodang("run", RECIPE, "--out", out, "--json", *settings)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_the_real_teacher_and_documents_go_the_whole_way(run):
    out, result = run
    models = result["models"]
    assert result["gate"]["passed"]
    assert models["teacher"]["parameters"] == 134_515_008
    assert 1 < models["teacher"]["perplexity"] < 60  # a real language model on real text
    assert models["student"]["kl"] < models["untrained"]["kl"]
    parity = json.loads((out / "release" / "gguf-parity.json").read_text())
    assert "f16" in json.dumps(parity)
    done = seodang("release", "verify", out / "release", "--public-key", out / "signing.pub")
    assert done.returncode == 0, done.stderr


def test_every_sequence_is_traced_to_a_licence(run):
    out, _ = run
    documents = {d["id"]: d for d in read_documents(out / "corpus")}
    licences = {s.name: s.license for s in load_recipe(RECIPE).corpus.sources}
    for sequence in open_store(out / "soft-labels"):
        document = documents[sequence.document_id]
        assert document["license"] == licences[document["source"]]
        assert document["split"] == "train"


def test_the_teacher_was_read_right(run):
    """SmolLM2 puts a sensible token first at most positions; a mangled tokenizer does not."""
    out, _ = run
    hits = total = 0
    for sequence in open_store(out / "soft-labels"):
        for position in sequence.labelled[sequence.labelled < len(sequence.token_ids) - 1]:
            if sequence.offsets[position] == sequence.offsets[position + 1]:
                continue  # nothing was likely here, and nothing drawn
            entries = slice(sequence.offsets[position], sequence.offsets[position + 1])
            first = sequence.ids[entries][sequence.weights[entries].argmax()]
            hits += int(first == sequence.token_ids[position + 1])
            total += 1
    assert hits / total > 0.3
