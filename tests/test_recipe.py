"""Recipes: whatever is wrong is refused before any work, with file, line, key and a way out."""

from __future__ import annotations

import glob
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seodang.errors import InputError
from seodang.foundation.recipe import is_foundation_recipe, load_foundation_recipe
from seodang.recipe import Recipe
from seodang.recipe_file import load_recipe, read_as

# Synthetic: written for these tests. Line numbers below count from its first line.
RECIPE = """\
name: demo
corpus:
  sources:
    - name: help
      license: MIT
      path: docs/*.md
    - name: dialogues
      package: some-dialogues
      version: 1.2.0
      sha256: "{hash}"
      license: BSD-3-Clause
      files: ["data/*.json"]
      messages:
        - role: user
          content: "{{question}}"
        - role: assistant
          content: "{{answer}}"
teacher:
  path: teacher
student:
  layers: 2
gate:
  beats:
    untrained: {{kl: 0.5}}
release:
  name: demo
  license: Apache-2.0
""".format(hash="0" * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "faq.md").write_text("How do I return an order?")
    (tmp_path / "teacher").mkdir()
    return tmp_path


def load(folder: Path, text: str | bytes = RECIPE, settings: list[str] | None = None) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(file, settings)


def refusal(folder: Path, text: str | bytes = RECIPE, settings: list[str] | None = None) -> str:
    """The message of a refusal, without the test's folder."""
    with pytest.raises(InputError) as caught:
        load(folder, text, settings)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "")


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


def test_a_recipe_is_read_with_its_defaults_and_absolute_paths(folder: Path) -> None:
    recipe = load(folder)
    assert recipe.corpus.sources[0].path == str(folder / "docs" / "*.md")
    assert recipe.teacher.path == str(folder / "teacher")
    assert (recipe.student.layers, recipe.student.epochs) == (2, 1)
    assert recipe.soft_labels.parameters() == {"threshold": 0.06}
    assert recipe.gate.beats["untrained"].kl == 0.5
    assert [str(pin) for pin in recipe.packages()] == ["some-dialogues==1.2.0"]


def test_the_recipes_of_the_repository_load() -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for file in recipes:
        if is_foundation_recipe(file):
            assert load_foundation_recipe(file).name == file.stem
            continue
        recipe, _ = read_as(Recipe, file)
        assert recipe.name == file.stem
        if recipe.quick:
            read_as(Recipe, file, quick=True)
        # Files of tasks are made by a script first, and such teachers by another recipe.
        if not recipe.tasks and recipe.teacher.path is None:
            load_recipe(file)


@pytest.mark.parametrize("value", ["1e-3", "1.0e-3", "0.001", "+1E-3"])
def test_numbers_as_people_write_them(folder: Path, value: str) -> None:
    assert load(folder, settings=[f"student.learning_rate={value}"]).student.learning_rate == 1e-3
    text = changed("layers: 2", f"layers: 2\n  learning_rate: {value}")
    assert load(folder, text).student.learning_rate == 1e-3


ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)

WRONG = {
    "unknown key": (
        changed("layers: 2", "layers: 2\n  learnig_rate: 0.1"),
        "recipe.yaml:22: unknown key `student.learnig_rate`; nearest valid key: `learning_rate`",
    ),
    "unknown section": (
        changed("student:", "studnt:"),
        "recipe.yaml:20: unknown key `studnt`; nearest valid key: `student`",
    ),
    "unknown key in a list": (
        changed("      license: MIT\n", "      licence: MIT\n"),
        "recipe.yaml:5: unknown key `corpus.sources.0.licence`; nearest valid key: `license`",
    ),
    "unknown key in a list in a list": (
        changed("- role: user", "- rol: user"),
        "recipe.yaml:14: unknown key `corpus.sources.1.messages.0.rol`; nearest valid key: `role`",
    ),
    "unknown key in a mapping": (
        changed("kl: 0.5", "top_1: 0.5"),
        "recipe.yaml:24: unknown key `gate.beats.untrained.top_1`; "
        "nearest valid key: `top1_agreement`",
    ),
    "unknown baseline": (
        changed("untrained:", "random:"),
        "recipe.yaml:24: `gate.beats.random`: Input should be 'untrained', 'cross_entropy', "
        "'lexical' or 'search'",
    ),
    "missing key": (
        changed("      license: MIT\n", ""),
        "recipe.yaml:4: the key `corpus.sources.0.license` is missing",
    ),
    "missing section": (
        changed("teacher:\n  path: teacher\n", ""),
        "recipe.yaml:1: the key `teacher` is missing",
    ),
    "empty section": (
        changed("student:\n  layers: 2\n", "student:\n"),
        "recipe.yaml:20: `student` must be a section with the keys start, path, architecture",
    ),
    "text for a number": (
        changed("layers: 2", "layers: two"),
        "recipe.yaml:21: `student.layers`: Input should be a valid integer (found 'two')",
    ),
    "fraction for a number": (
        changed("layers: 2", "layers: 2.0"),
        "recipe.yaml:21: `student.layers`: Input should be a valid integer (found 2.0)",
    ),
    "yes for a number": (
        changed("layers: 2", "layers: yes"),
        "recipe.yaml:21: `student.layers`: Input should be a valid integer (found True)",
    ),
    "number for text": (
        changed("version: 1.2.0", "version: 1.10"),
        "recipe.yaml:9: `corpus.sources.1.version`: Input should be a valid string (found 1.1)",
    ),
    "list for a section": (
        changed("  path: teacher", "  - path: teacher"),
        "recipe.yaml:18: `teacher` must be a section",
    ),
    "out of range": (
        changed("layers: 2", "layers: 0"),
        "recipe.yaml:21: `student.layers`: Input should be greater than 0 (found 0)",
    ),
    "infinite": (
        changed("layers: 2", "layers: 2\n  learning_rate: .inf"),
        "recipe.yaml:22: `student.learning_rate`: Input should be a finite number (found inf)",
    ),
    "hash cut short": (
        changed("0" * 64, "0" * 63),
        "recipe.yaml:10: `corpus.sources.1.sha256`: String should match pattern",
    ),
    "package that is an option of pip": (
        changed("package: some-dialogues", "package: --index-url=http://a"),
        "recipe.yaml:8: `corpus.sources.1.package`: String should match pattern",
    ),
    "package without pin": (
        changed("      version: 1.2.0\n", ""),
        "recipe.yaml:7: `corpus.sources.1`: a package needs `version` and `sha256`",
    ),
    "two origins": (
        changed("  path: teacher", "  path: teacher\n  package: llm"),
        "recipe.yaml:18: `teacher`: name exactly one of `path`, `package` and `foundation`",
    ),
    "two templates": (
        changed("      messages:", '      text: "{a}"\n      messages:'),
        "recipe.yaml:7: `corpus.sources.1`: name at most one of `text`, `messages` and `turns`",
    ),
    "two sources of one name": (
        changed("- name: dialogues", "- name: help"),
        "recipe.yaml:7: the name 'help' is another source's; rename one",
    ),
    "parameter of another estimator": (
        RECIPE + "soft_labels:\n  k: 4\n",
        "recipe.yaml:28: `soft_labels`: `k` has no meaning for the estimator head-tail",
    ),
    "unknown estimator": (
        RECIPE + "soft_labels: {estimator: topk}\n",
        "recipe.yaml:28: `soft_labels.estimator`: Input should be 'top-k'",
    ),
    "threshold above which nothing is a tail": (
        RECIPE + "soft_labels: {threshold: 0.7}\n",
        "recipe.yaml:28: `soft_labels.threshold`: Input should be less than or equal to 0.5",
    ),
    "threshold that keeps more than a record holds": (
        RECIPE + "soft_labels: {threshold: 0.00001}\n",
        "recipe.yaml:28: `soft_labels.threshold`: Input should be greater than or equal to 0.0001",
    ),
    "server without a model": (
        changed("  path: teacher", "  path: teacher\n  server: http://127.0.0.1:8000/v1"),
        "recipe.yaml:18: `teacher`: `server` and `model` belong together",
    ),
    "server whose precision is asked for": (
        changed(
            "  path: teacher",
            "  path: teacher\n  server: http://127.0.0.1:80/v1\n  model: m\n  precision: bfloat16",
        ),
        "recipe.yaml:18: `teacher`: a server computes as it was started: leave `precision` out",
    ),
    "server that is none": (
        changed("  path: teacher", "  path: teacher\n  server: 127.0.0.1\n  model: m"),
        "recipe.yaml:20: `teacher.server`: String should match pattern",
    ),
    "no such file": (
        changed("docs/*.md", "docs/*.txt"),
        "recipe.yaml:6: `corpus.sources.0.path`: no file at docs/*.txt (looked for docs/*.txt)",
    ),
    "no such teacher": (
        changed("path: teacher", "path: ~nobody-here/teacher"),
        "recipe.yaml:19: `teacher.path`: no file at ~nobody-here/teacher",
    ),
    "path too long": (
        changed("path: teacher", f"path: {'t' * 5000}"),
        "recipe.yaml:19: `teacher.path`: no file at ttt",
    ),
    "half a surrogate pair": (
        changed("name: demo\ncorpus", 'name: "\\ud800"\ncorpus'),
        "recipe.yaml:1: `name`: ",
    ),
    "template left open": (
        changed("{answer}", "{answer"),
        "recipe.yaml:17: `corpus.sources.1.messages.1.content`: expected '}' before end of string",
    ),
    "template closed twice": (
        changed("{answer}", "{answer}}"),
        "recipe.yaml:17: `corpus.sources.1.messages.1.content`: Single '}'",
    ),
    "template without a field": (
        changed("{answer}", "{}"),
        "recipe.yaml:17: `corpus.sources.1.messages.1.content`: {} names no field",
    ),
    "template with an unknown conversion": (
        changed("{answer}", "{answer!x}"),
        "recipe.yaml:17: `corpus.sources.1.messages.1.content`: unknown conversion !x",
    ),
    "template with a broken format": (
        changed("{answer}", "{answer:{}}"),
        "recipe.yaml:17: `corpus.sources.1.messages.1.content`: {} names no field",
    ),
    "text template": (
        changed("path: docs/*.md", 'path: docs/*.md\n      text: "{"'),
        "recipe.yaml:7: `corpus.sources.0.text`: ",
    ),
    "key twice": (
        RECIPE + "teacher: {path: teacher}\n",
        "recipe.yaml:28: the key `teacher` stands here twice",
    ),
    "key that is a list": (RECIPE + "? [a]\n: b\n", "recipe.yaml:28: a key must be a plain word"),
    "no mapping": ("- a\n- b\n", "recipe.yaml:1: a recipe is a mapping of sections"),
    "one word": ("demo\n", "recipe.yaml:1: a recipe is a mapping of sections"),
    "empty": ("", "recipe.yaml:1: a recipe is a mapping of sections"),
    "only a comment": ("# later\n", "recipe.yaml:1: a recipe is a mapping of sections"),
    "two documents": (RECIPE + "---\na: 1\n", "recipe.yaml:28: not valid YAML: "),
    "tab": (changed("  path: teacher", "\tpath: teacher"), "recipe.yaml:19: not valid YAML: "),
    "indentation": (changed("  path: teacher", "   a\n  path: b"), "recipe.yaml:20: not valid "),
    "quote left open": (RECIPE + 'description: "a\n', "recipe.yaml:29: not valid YAML: "),
    "no such anchor": (RECIPE + "description: *a\n", "recipe.yaml:28: not valid YAML: "),
    "control character": (
        changed("path: teacher", "path: tea\x07cher"),
        "recipe.yaml:19: holds the control character U+0007",
    ),
    "not UTF-8": (
        RECIPE.encode() + b"description: caf\xe9\n",
        "recipe.yaml:28: not UTF-8: ",
    ),
    "no such date": (
        changed("version: 1.2.0", "version: 2026-13-01"),
        "recipe.yaml:9: '2026-13-01' is not a valid timestamp",
    ),
    "tag that does not fit": (
        changed("layers: 2", "layers: !!int two"),
        "recipe.yaml:21: 'two' is not a valid int",
    ),
    "number without end": (
        changed("layers: 2", f"layers: {'9' * 5000}"),
        "recipe.yaml:21: '999999999999...9999999999999' is not a valid int",
    ),
    "cycle of a list": (
        RECIPE + "evaluation:\n  prompts: &all [*all]\n",
        "recipe.yaml:29: an anchor contains itself (a cycle)",
    ),
    "cycle of a mapping": (
        RECIPE + "evaluation: &e\n  prompts: [*e]\n",
        "recipe.yaml:28: an anchor contains itself (a cycle)",
    ),
    "cycle through two anchors": (
        RECIPE + "evaluation: &a\n  prompts: &b [{x: *a}, *b]\n",
        "recipe.yaml:28: an anchor contains itself (a cycle)",
    ),
    "aliases that multiply": (ALIAS_BOMB, "too many values: aliases multiply each other"),
    "lists too deep": ("a: " + "[" * 100_000, "recipe.yaml: nested too deeply"),
    "mappings too deep": ("{a: " * 50_000, "recipe.yaml: nested too deeply"),
    "too large": ("# \n" * 100_000, "recipe.yaml: more than 262,144 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(folder: Path, case: str) -> None:
    text, message = WRONG[case]
    assert message in refusal(folder, text)


def test_a_python_tag_builds_nothing(folder: Path) -> None:
    call = f"!!python/object/apply:os.system [touch {folder}/made]"
    text = changed("name: demo\ncorpus", f"name: {call}\ncorpus")
    assert "recipe.yaml:1: `name`: Input should be a valid string" in refusal(folder, text)
    text = changed("layers: 2", "layers: !!python/name:os.system ''")
    assert "recipe.yaml:21: not valid YAML" in refusal(folder, text)
    assert not (folder / "made").exists()


def test_every_mistake_is_listed_but_not_without_end(folder: Path) -> None:
    text = changed("layers: 2", "layers: two\n  epochs: none")
    assert len(refusal(folder, text).splitlines()) == 2
    lines = refusal(folder, RECIPE + "".join(f"k{i}: 1\n" for i in range(100))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 80 more"


def test_files_that_are_no_recipe(folder: Path) -> None:
    for file, message in (
        (folder / "nowhere.yaml", "nowhere.yaml: no such recipe"),
        (folder, "is a directory; name the recipe file"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe(file)


OVERRIDES = {
    "student.layer=3": "unknown key `student.layer`; nearest valid key: `layers`",
    "studnt.layers=3": "unknown key `studnt`; nearest valid key: `student`",
    "student={layers: 3, epoch: 1}": "unknown key `student.epoch`; nearest valid key: `epochs`",
    "student.layers": "write it as section.key=value",
    "=3": "write it as section.key=value",
    "student.layers=many": "`student.layers`: Input should be a valid integer (found 'many')",
    "student.epochs=": "`student.epochs`: Input should be a valid integer (found None)",
    "student.vocabulary={trim: 8192, keep: 0.9}": "`student.vocabulary`: "
    "name exactly one of `trim` and `keep`",
    "student.vocabulary={trims: 8192}": "unknown key `student.vocabulary.trims`; "
    "nearest valid key: `trim`",
    "student.on_policy={divergence: forward-kl}": "`student.on_policy.divergence`: "
    "Input should be 'reverse-kl' or 'jsd'",
    "student.path=gone": "`student.path`: no file at gone",
    "student.layers=[1": "the value is not valid YAML",
    "student.layers=!!int x": "the value is not valid YAML",
    "teacher=&a [*a]": "the value is not valid YAML",
    "name.first=3": "`name` has no keys",
    "corpus.sources.2.name=x": "`2` is not an index below 2",
    "corpus.sources.-1.name=x": "`-1` is not an index below 2",
    "corpus.sources.²=x": "`²` is not an index below 2",
    "corpus.sources.help.name=x": "`help` is not an index below 2",
    "corpus.sources.1.name=help": "the name 'help' is another source's; rename one",
    "corpus.sources.0.path=gone.md": "`corpus.sources.0.path`: no file at gone.md",
    "soft_labels.k=4": "`soft_labels`: `k` has no meaning for the estimator head-tail",
}


@pytest.mark.parametrize("setting", OVERRIDES)
def test_a_wrong_override_names_itself(folder: Path, setting: str) -> None:
    message = refusal(folder, settings=[setting])
    assert message.startswith(f"--set {setting}: {OVERRIDES[setting]}")
    assert "recipe.yaml" not in message


def test_sections_that_do_not_fit_together_are_refused(folder: Path) -> None:
    message = refusal(folder, settings=["student.divergence=jsd"])
    assert message.startswith("recipe.yaml:1: `student.divergence` jsd needs the teacher's prob")
    assert "set `soft_labels.estimator` to residual" in message
    load(folder, settings=["student.divergence=jsd", "soft_labels.estimator=residual"])


QUICK = (
    RECIPE
    + """\
quick:
  student.epochs: 1
  student.layers: 1
  corpus.train_tokens: many
"""
)


def test_the_quick_form_replaces_its_keys_before_the_overrides(folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(QUICK.replace("many", "500").replace("layers: 2", "layers: 2\n  epochs: 9"))
    whole, quick = load_recipe(file), load_recipe(file, ["student.layers=3"], quick=True)
    assert (whole.student.epochs, whole.student.layers, whole.corpus.train_tokens) == (9, 2, None)
    assert (quick.student.epochs, quick.student.layers, quick.corpus.train_tokens) == (1, 3, 500)


def test_a_wrong_quick_form_is_refused_where_it_stands(folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(QUICK)
    load_recipe(file)
    with pytest.raises(InputError, match=r"recipe\.yaml:31: `corpus\.train_tokens`: Input should"):
        load_recipe(file, quick=True)
    file.write_text(QUICK.replace("corpus.train_tokens: many", "name.first: 3"))
    with pytest.raises(InputError, match=r"recipe\.yaml:31: `name` has no keys"):
        load_recipe(file, quick=True)
    file.write_text(RECIPE)
    with pytest.raises(InputError, match=r"recipe\.yaml:1: --quick: the recipe has no section"):
        load_recipe(file, quick=True)


def test_a_recipe_that_reads_nothing_is_refused(folder: Path) -> None:
    start = RECIPE.index("  sources:")
    text = RECIPE[:start] + "  held_out: 0.2\n" + RECIPE[RECIPE.index("teacher:") :]
    assert "no `corpus.sources` and no task with a `train` file" in refusal(folder, text)


def test_overrides_change_the_recipe_in_order(folder: Path) -> None:
    recipe = load(
        folder,
        settings=[
            "student.layers=3",
            "student.layers=4",
            "soft_labels.estimator=sampled",
            "soft_labels.draws=5",
            "gate.beats.untrained={kl: 1}",
            "corpus.sources.0.name=a=b",
            "evaluation.prompts=['one, two', three]",
        ],
    )
    assert recipe.student.layers == 4
    assert recipe.soft_labels.parameters() == {"draws": 5}
    assert recipe.gate.beats["untrained"].kl == 1
    assert recipe.corpus.sources[0].name == "a=b"
    assert recipe.evaluation.prompts == ["one, two", "three"]


def test_an_override_mends_what_the_file_has_wrong(folder: Path) -> None:
    text = changed("layers: 2", "layers: two")
    assert load(folder, text, ["student.layers=2"]).student.layers == 2


def test_an_anchor_used_twice_is_not_changed_twice(folder: Path) -> None:
    text = changed("{kl: 0.5}", "&margin {kl: 0.5}\n    cross_entropy: *margin")
    beats = load(folder, text, ["gate.beats.untrained.kl=1"]).gate.beats
    assert (beats["untrained"].kl, beats["cross_entropy"].kl) == (1, 0.5)


def test_folders_and_files_may_hold_pattern_characters(folder: Path) -> None:
    odd = folder / "run [1]"
    (odd / "teacher[v2]").mkdir(parents=True)
    (odd / "faq*[en].md").write_text("x")
    text = changed("docs/*.md", "faq*[en].md").replace("path: teacher", "path: teacher[v2]")
    recipe = load(odd, text)
    assert recipe.teacher.path == str(odd / "teacher[v2]")
    assert glob.glob(str(recipe.corpus.sources[0].path)) == [str(odd / "faq*[en].md")]


@pytest.mark.parametrize(
    "template",
    ["{question}", "{{literal}} {a b}", "{name!r:>10}", "{price:{width}.2f}", "", "no field"],
)
def test_templates_that_are_right(folder: Path, template: str) -> None:
    source = load(folder, changed("path: docs/*.md", f"path: docs/*.md\n      text: '{template}'"))
    assert source.corpus.sources[0].text == template


# Anything at all, as a recipe or as a value in one: a Recipe or an InputError, nothing else.

YAML_PIECES = st.sampled_from(
    [
        *("---\n", "...\n", "&a ", "*a ", "<<: *a\n", "{", "}", "[", "]", ": ", "- ", "? ", "\n  "),
        *("'", '"', "|\n", ">\n", "%YAML 1.2\n", "!!int x", "!!bool q", "!!timestamp t", "!!null"),
        *("!!binary é", "!!set {a}", "!!python/name:os.system ''", "2026-99-99", "0x_", "1:60:70"),
        *("1" * 5000, "\t", "\0", '"\\ud800"', "\ufeff", "~", "-.inf", ".nan", "1e999", "#", "\r"),
        *("name: ", "corpus:", "  sources:", "student.layers", "teacher: ", "path: ", "*", "~x"),
    ]
)
anything = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def loads_or_is_refused(folder: Path, text: str | bytes, settings: list[str]) -> None:
    with suppress(InputError):
        assert isinstance(load(folder, text, settings), Recipe)


@anything
@given(data=st.binary(max_size=200) | st.lists(YAML_PIECES | st.text(max_size=4)).map("".join))
def test_any_bytes_are_refused_in_words(folder: Path, data: str | bytes) -> None:
    loads_or_is_refused(folder, data, [])


@anything
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(RECIPE)), YAML_PIECES | st.text(max_size=4)), max_size=4
    ),
    overrides=st.lists(
        st.builds(
            "{}={}".format,
            st.lists(
                st.sampled_from(["corpus", "sources", "0", "student", "layers", "gate", "²"])
                | st.text(max_size=2)
            ).map(".".join),
            YAML_PIECES | st.text(max_size=4),
        ),
        max_size=2,
    ),
)
def test_any_change_of_a_recipe_is_taken_or_refused(
    folder: Path, edits: list[tuple[int, str]], overrides: list[str]
) -> None:
    text = RECIPE
    for position, piece in edits:
        text = text[:position] + piece + text[position:]
    loads_or_is_refused(folder, text, overrides)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@anything
@given(value=plain, key=st.sampled_from([*Recipe.model_fields, "other"]))
def test_any_value_of_any_section_is_taken_or_refused(folder: Path, value: Any, key: str) -> None:
    data = yaml.safe_load(RECIPE) | {key: value}
    loads_or_is_refused(folder, yaml.safe_dump(data, allow_unicode=True), [])


def test_loading_needs_no_heavy_library(folder: Path) -> None:
    """The recipe is checked before torch is loaded: a typo is answered at once."""
    (folder / "recipe.yaml").write_text(RECIPE)
    code = (
        "import sys; from seodang.recipe_file import load_recipe; load_recipe(sys.argv[1]);"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder / "recipe.yaml")]
    assert subprocess.run(command, check=False).returncode == 0
