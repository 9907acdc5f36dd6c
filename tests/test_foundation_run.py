"""From raw text to a teacher, and from that to a released student, through the command line.

The raw text is synthetic: sentences put together from lists of words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from seodang.artifact import Artifact
from seodang.foundation.recipe import is_foundation_recipe, load_foundation_recipe
from test_raw_corpus_build import english, korean
from tiny_foundation import CONFIG, MODEL
from tiny_run import seodang, tiny_recipe

STAGES = ["raw-corpus", "tokenizer", "tokens", "base", "teacher"]
POST_TRAINING = {
    "problems": 16,
    "overlap_problems": 8,
    "held_out": 4,
    "instruct": {"batch_sequences": 8},
    "reasoning": {"batch_sequences": 8},
    "overlap": {"batch_sequences": 8},
    "policy": {"rounds": 2, "instructions": 2, "answers": 2, "checkpoint_rounds": 1},
    "max_new_tokens": 6,
}


def foundation_recipe(folder: Path, **changes: Any) -> Path:
    """Raw text and a recipe for it below ``folder``; returns the recipe's path."""
    (folder / "raw").mkdir(parents=True)
    for number in range(60):
        (folder / "raw" / f"ko{number}.md").write_text(korean(number), encoding="utf-8")
        (folder / "raw" / f"en{number}.txt").write_text(english(number), encoding="utf-8")
    model = {**MODEL.model_dump(exclude={"preset", "vocabulary"}), "vocabulary": 700}
    recipe = {
        "name": "tiny-foundation",
        "corpus": {
            "sources": [{"name": "synthetic", "license": "CC0-1.0", "path": "raw"}],
            "held_out": 0.15,
            "shards": 2,
        },
        "tokenizer": {
            "vocabulary": 430,
            "mixture": {"ko": 0.5, "en": 0.5},
            "min_character_count": 200,
            "spare_tokens": 2,
        },
        "model": model | {"context": 96},
        "pretraining": CONFIG.model_dump(exclude_defaults=True),
        **changes,
    }
    file = folder / "foundation.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foundation_recipe(tmp_path_factory.mktemp("foundation"))


@pytest.fixture(scope="module")
def built(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("built") / "out"
    done = seodang("foundation", "run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_every_stage_is_an_artifact(built: tuple[Path, dict[str, Any]]) -> None:
    out, result = built
    assert list(result["stages"]) == STAGES
    assert all(stage["ran"] for stage in result["stages"].values())
    for name in STAGES:
        artifact = Artifact.open(out / name)
        assert artifact.digest == result["stages"][name]["digest"]
        assert artifact.verify() == []
        assert [source.license for source in artifact.manifest.sources] == ["CC0-1.0"]
    assert set(result["pretraining"]["held_out_nats_per_byte"]) >= {"ko", "en"}
    report = json.loads((out / "teacher" / "teacher.json").read_text())
    assert report["pretraining"] == result["pretraining"]


def test_the_card_says_what_the_teacher_is_and_read(built: tuple[Path, dict[str, Any]]) -> None:
    teacher = Path(built[1]["teacher"])
    card = (teacher / "README.md").read_text("utf-8")
    assert f"{built[1]['pretraining']['held_out_nats_per_byte']['ko']:.3f}" in card
    assert "](routing.svg)" in card
    assert "busiest expert" in (teacher / "routing.svg").read_text()
    for source in Artifact.open(teacher).manifest.sources:
        assert f"| {source.name} |" in card
    assert "## Two modes" not in card  # it was not post-trained


def test_the_teacher_is_a_plain_directory_of_transformers(
    built: tuple[Path, dict[str, Any]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built[1]["teacher"])
    model, report = AutoModelForCausalLM.from_pretrained(
        built[1]["teacher"], output_loading_info=True
    )
    assert type(model).__name__ == "AXK1ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokenizer("서당의 훈장", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_teacher_holds_what_vllm_reads_besides(built: tuple[Path, dict[str, Any]]) -> None:
    teacher = Path(built[1]["teacher"])
    config = json.loads((teacher / "config.json").read_bytes())
    assert config["first_k_dense_replace"] == MODEL.dense_layers == 1
    assert config["moe_layer_freq"] == 1
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    with safe_open(teacher / "model.safetensors", "pt") as weights:
        head, embedding = (
            weights.get_tensor(f"{n}.weight") for n in ("lm_head", "model.embed_tokens")
        )
        norms = {name for name in weights.keys() if "post_mlp_layernorm" in name}  # noqa: SIM118
    assert config["tie_word_embeddings"]
    assert torch.equal(head, embedding)
    assert norms == {f"model.layers.{i}.post_mlp_layernorm.weight" for i in range(MODEL.layers)}


def test_only_what_depends_on_a_key_is_made_again(
    built: tuple[Path, dict[str, Any]], recipe: Path
) -> None:
    out, result = built
    again = seodang("foundation", "run", recipe, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stderr
    changed = seodang(
        *("foundation", "run", recipe, "--out", out, "--json"),
        *("--set", "pretraining.learning_rate=0.005"),
    )
    stages = json.loads(changed.stdout)["stages"]
    assert [name for name in STAGES if stages[name]["ran"]] == ["base", "teacher"]
    back = seodang("foundation", "run", recipe, "--out", out, "--json")
    made_again = json.loads(back.stdout)["stages"]
    assert made_again["teacher"]["digest"] == result["stages"]["teacher"]["digest"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tokeniser={}", "unknown key `tokeniser`; nearest valid key: `tokenizer`"),
        ("model.experts=7", "experts"),
        ("tokenizer.vocabulary=900", "is more than the embedding's 700 rows"),
        ("corpus.sources.0.path=nowhere", "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    recipe: Path, tmp_path: Path, setting: str, says: str
) -> None:
    done = seodang("foundation", "run", recipe, "--out", tmp_path / "out", "--set", setting)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "raw-corpus").exists()


def test_a_recipe_tells_what_it_is(recipe: Path, tmp_path: Path) -> None:
    assert is_foundation_recipe(recipe)
    assert not is_foundation_recipe(tiny_recipe(tmp_path))
    assert load_foundation_recipe(recipe).packages() == []


def test_from_raw_text_to_a_released_student(tmp_path: Path) -> None:
    """A teacher of our own with two modes, and a dense Llama that learns from its soft labels."""
    foundation_recipe(tmp_path, post_training=POST_TRAINING)
    recipe = tiny_recipe(
        tmp_path,
        24,
        teacher={"path": None, "foundation": "foundation.yaml", "license": "Apache-2.0"},
        student={
            "start": "scratch",
            "architecture": "llama",
            "layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "heads": 2,
        },
        gate={},
    )
    out = tmp_path / "out"
    done = seodang("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["gate"]["passed"]
    report = json.loads((out / "foundation" / "teacher" / "teacher.json").read_text())
    assert [row["step"] for row in report["post_training"]] == [
        *("instruct", "reasoning", "merged", "overlap", "policy")
    ]
    teacher = Artifact.open(out / "foundation" / "teacher")
    # What it read before its post-training is not forgotten, by no step.
    steps = [out / "foundation" / "post-training" / row["step"] for row in report["post_training"]]
    for made in (teacher, *map(Artifact.open, steps)):
        assert [source.license for source in made.manifest.sources] == ["CC0-1.0", "Apache-2.0"]
    policy = report["post_training"][-1]["think"]
    row = f"| policy | think | {policy['obeyed']:.1%} | {policy['accuracy']:.1%} |"
    assert row in (teacher.path / "README.md").read_text("utf-8")
    assert json.loads((out / "student" / "config.json").read_text())["model_type"] == "llama"
    parity = json.loads((out / "release" / "gguf-parity.json").read_text())
    assert parity["chat_template"]["mismatches"] == 0
    again = seodang("run", recipe, "--out", out, "--json")
    assert not any(s["ran"] for s in json.loads(again.stdout)["stages"].values())
    assert again.stderr.count("Nothing to do") == 1  # of the whole run, not of its teacher too
