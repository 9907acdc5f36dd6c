"""The typed recipe: everything a run does, checked before any work starts.

:mod:`seodang.recipe_file` reads it from YAML and says where what is wrong stands.
"""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from seodang.errors import InputError
from seodang.packages import PackageName, PackagePin, PackageVersion, Registry, Sha256

EstimatorName = Literal["top-k", "residual", "sampled", "head-tail"]
Layout = Literal["fast", "small"]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"]
BaselineName = Literal["untrained", "cross_entropy", "lexical", "search"]
TaskKind = Literal["choice", "ranking", "json", "answer"]
Language = Literal["ko", "en"]
Precision = Literal["float32", "bfloat16"]
TaskMetric = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.[a-z0-9@_]+$")]
Share = Annotated[float, Field(ge=0, le=1)]
TASK_METRICS: dict[TaskKind, tuple[str, ...]] = {
    "choice": ("accuracy",),
    "ranking": ("ndcg@10", "mrr@10", "recall@10"),
    "json": ("schema_valid", "exact_match", "field_f1"),
    "answer": ("exact_match", "token_f1", "refusal_f1"),
}
"""The figures of each kind of task that a gate can ask for: in [0, 1], higher is better."""


def _check_template(template: str) -> str:
    """Refuse what is not text with ``{field}`` in it (``{{`` and ``}}`` stand for braces)."""
    for _, field, form, conversion in string.Formatter().parse(template):
        if field == "":
            raise ValueError("{} names no field: write {field}, or {{}} for the braces themselves")
        if conversion not in (None, "a", "r", "s"):
            raise ValueError(f"unknown conversion !{conversion} in a template")
        if form:
            _check_template(form)
    return template


Template = Annotated[str, AfterValidator(_check_template)]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Message(Section):
    """One turn of a chat; ``content`` may name fields of the record in braces."""

    role: Literal["system", "user", "assistant"]
    content: Template = Field(description="may name fields of the record in braces")


class Origin(Section):
    """Files of this machine (``path``), or a ``package`` pinned by version and hash."""

    path: str | None = Field(
        None, description="file, directory or pattern, from the recipe's folder"
    )
    package: PackageName | None = None
    version: PackageVersion | None = None
    sha256: Sha256 | None = None

    @property
    def _places(self) -> dict[str, str | None]:
        """The keys of which exactly one says where it comes from."""
        return {"path": self.path, "package": self.package}

    @property
    def _registry(self) -> Registry:
        """Which registry the package is of."""
        return "pypi"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(place is not None for place in self._places.values()) != 1:
            *first, last = (f"`{key}`" for key in self._places)
            raise ValueError(f"name exactly one of {', '.join(first)} and {last}")
        if self.package is not None and not (self.version and self.sha256):
            raise ValueError("a package needs `version` and `sha256`")
        if self.package is None and (self.version or self.sha256):
            raise ValueError("`version` and `sha256` belong to a `package`")
        return self

    def pin(self) -> PackagePin | None:
        """The package, pinned; None for a path."""
        if self.package is None:
            return None
        assert self.version is not None
        assert self.sha256 is not None
        return PackagePin(
            registry=self._registry,
            package=self.package,
            version=self.version,
            sha256=self.sha256,
        )


class SourceConfig(Origin):
    """Where documents come from: files of this machine (``path``) or of a pinned ``package``."""

    name: str = Field(description="how it is called on cards and in errors")
    license: str = Field(description="SPDX expression, or LicenseRef-...")
    attribution: str | None = Field(None, description="whom the licence wants named")
    files: list[str] = Field([], description="patterns of members of the package")
    records: str | None = Field(None, description="dotted path to the list of records")
    text: Template | None = Field(None, description="template of a text, {field} in braces")
    messages: list[Message] | None = Field(None, description="template of a chat document")
    turns: bool = Field(False, description="a record is a list of turns, user first")
    max_tokens: int | None = Field(None, gt=0, description="take about this many tokens at most")

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if (self.package is not None) != bool(self.files):
            raise ValueError("a package needs `files`, and a `path` has none")
        if sum((self.text is not None, self.messages is not None, self.turns)) > 1:
            raise ValueError("name at most one of `text`, `messages` and `turns`")
        return self


class CorpusConfig(Section):
    """Documents, their split by document, and the sequences made of them."""

    sources: list[SourceConfig] = Field([], description="beside the examples of tasks")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of documents held out")
    near_duplicate: float = Field(
        0.7, gt=0, le=1, description="Jaccard similarity from which documents share a side"
    )
    max_length: int = Field(512, ge=2, description="tokens of a sequence, at most")
    max_document_bytes: int = Field(1_000_000, gt=0, description="longer documents are refused")
    train_tokens: int | None = Field(
        None, gt=0, description="take about this many tokens to train on"
    )
    held_out_tokens: int | None = Field(
        None, gt=0, description="take about this many tokens to hold out"
    )


class TrainingConfig(Section):
    """What the training loop is told, whatever it trains."""

    batch_tokens: int = Field(1024, gt=0, description="tokens of one optimizer step, about")
    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="tokens of a forward pass, about (default: 512 on a CPU, else the whole batch)",
    )
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its highest")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="of the learning rate: cosine, or warm-up, stable, decay"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, gt=0, lt=1, description="share of the steps, of wsd")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    precision: Precision = Field(
        "float32", description="of the products; weights and optimizer stay float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them"
    )
    seed: int = Field(0, ge=0, description="of the order of the batches")
    checkpoint_steps: int = Field(25, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(1, gt=0, description="newest checkpoints that stay")


class TeacherTuningConfig(TrainingConfig):
    """Training of the teacher on the answers of the corpus, before it labels them."""

    epochs: int = Field(1, gt=0, description="times that every sequence is seen")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at its highest")


class TeacherConfig(Origin):
    """A local Hugging Face directory (``path``), or a pinned ``package`` that holds a model.

    With ``server`` the labels come from a server that runs the same model. A teacher of our own
    (``foundation``) is built from raw text by its own recipe, before all else.
    """

    foundation: str | None = Field(
        None, description="foundation recipe (YAML) that the teacher is built by"
    )
    license: str | None = Field(None, description="for the cards")
    server: str | None = Field(
        None, pattern="^https?://", description="address of a vLLM server's API, ends in /v1"
    )
    model: str | None = Field(None, description="the model's name on that server")
    precision: Precision = Field(
        "float32",
        description="in which it labels and answers; its output head stays in float32",
    )
    fine_tuning: TeacherTuningConfig | None = Field(
        None, description="on the corpus first (default: the teacher as it is)"
    )

    @property
    def _places(self) -> dict[str, str | None]:
        return {**super()._places, "foundation": self.foundation}

    @model_validator(mode="after")
    def _server_has_a_model(self) -> Self:
        if (self.server is None) != (self.model is None):
            raise ValueError("`server` and `model` belong together")
        if self.server and self.fine_tuning:
            raise ValueError("a served teacher is not trained here: leave `fine_tuning` out")
        if self.server and self.precision != "float32":
            raise ValueError("a server computes as it was started: leave `precision` out")
        return self


class SoftLabelsConfig(Section):
    """Which estimator of the teacher's distribution is stored, and how."""

    estimator: EstimatorName = "head-tail"
    k: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="entries of top-k and residual (default 16)"
    )
    threshold: Annotated[float, Field(ge=1e-4, le=0.5)] | None = Field(
        None, description="probability from which head-tail keeps every id (default 0.06)"
    )
    draws: Annotated[int, Field(ge=1, le=255)] | None = Field(
        None, description="draws of sampled (default 50)"
    )
    layout: Layout = Field("fast", description="records to slice (fast), or entropy-coded (small)")
    seed: int = Field(0, ge=0, description="of the draws")
    inputs: bool = Field(False, description="label what the assistant of a conversation reads, too")
    unusable: Literal["refuse", "skip"] = Field(
        "refuse",
        description="what to do with a sequence that cannot be labelled: stop, or report and go on",
    )

    @model_validator(mode="after")
    def _only_what_is_used(self) -> Self:
        used = {"head-tail": "threshold", "sampled": "draws"}.get(self.estimator, "k")
        for key in ("k", "threshold", "draws"):
            if getattr(self, key) is not None and key != used:
                raise ValueError(f"`{key}` has no meaning for the estimator {self.estimator}")
        return self

    def parameters(self) -> dict[str, int | float]:
        """The estimator's own parameters, defaults filled in."""
        if self.estimator == "head-tail":
            return {"threshold": 0.06 if self.threshold is None else self.threshold}
        if self.estimator == "sampled":
            return {"draws": 50 if self.draws is None else self.draws}
        return {"k": 16 if self.k is None else self.k}


def soft_labels_from_options(**options: Any) -> SoftLabelsConfig:
    """The section as command-line options give it; raises ``InputError`` naming the option."""
    try:
        return SoftLabelsConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{first['loc'][0]}: " if first["loc"] else ""
        raise InputError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


class VocabularyConfig(Section):
    """A vocabulary smaller than the teacher's: how many entries, or how much of the corpus."""

    trim: int | None = Field(None, ge=257, description="entries that are kept, all told")
    keep: float | None = Field(
        None, gt=0, le=1, description="share of the corpus' tokens that stay single tokens"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.trim is None) == (self.keep is None):
            raise ValueError("name exactly one of `trim` and `keep`")
        return self


class OnPolicyConfig(Section):
    """A last stage on the student's own words, scored by the teacher."""

    rounds: int = Field(1, gt=0, description="times of generating, scoring and training")
    prompts: int = Field(64, gt=0, description="prompts of a round, from the training documents")
    max_new_tokens: int = Field(64, gt=0, description="of an answer")
    temperature: float = Field(1.0, gt=0, description="of the student when it answers")
    k: int = Field(128, ge=1, le=65535, description="ids that the teacher scores at each position")
    divergence: Literal["reverse-kl", "jsd"] = Field("reverse-kl", description="what is minimised")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at its highest")


class StudentShape(Section):
    """Where the student starts, and what is kept of it."""

    start: Literal["pruned", "embeddings", "scratch"] = Field(
        "pruned",
        description="with the weights of the model it is cut from, with its embeddings alone, or "
        "with none of them",
    )
    path: str | None = Field(
        None,
        description="model directory to start from; its tokenizer must be the teacher's "
        "(default: the teacher)",
    )
    architecture: Literal["llama"] | None = Field(
        None, description="of random layers (default: that of the model it starts from)"
    )
    layers: int | None = Field(None, gt=0, description="layers that are kept (default: all)")
    hidden_size: int | None = Field(None, gt=0, description="width that is kept")
    intermediate_size: int | None = Field(None, gt=0, description="neurons kept of each MLP")
    heads: int | None = Field(None, gt=0, description="attention heads kept of each layer")
    experts: int | None = Field(None, gt=0, description="routed experts kept of each layer")
    reduce_experts: Literal["drop", "merge"] = Field(
        "drop", description="leave the other experts out, or average them into those kept"
    )
    vocabulary: VocabularyConfig | None = Field(None, description="a trimmed vocabulary")

    @model_validator(mode="after")
    def _other_architectures_have_no_weights(self) -> Self:
        if self.architecture and (self.start == "pruned" or self.path or self.experts):
            raise ValueError(
                "`architecture` is for random layers: set `start: embeddings` or `scratch`, and "
                "neither `path` nor `experts`"
            )
        return self


class StudentConfig(TrainingConfig, StudentShape):
    """The student's shape, where it starts, and its training."""

    epochs: int = Field(1, gt=0, description="times that every sequence is seen")
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = Field(
        "forward-kl", description="from the teacher; all but the first need residual labels"
    )
    cross_entropy_weight: float = Field(
        0.1, ge=0, le=1, description="of the observed tokens, beside the soft labels"
    )
    on_policy: OnPolicyConfig | None = Field(None, description="a last stage on its own words")


class TaskConfig(Section):
    """A task: examples to learn it from, and held-out ones that are only measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="in results and gates")
    kind: TaskKind = Field(description="choice, ranking, json or answer")
    languages: list[Language] | None = Field(
        None, min_length=1, description="take only the examples in these (default: all)"
    )
    train: str | None = Field(None, description="task file whose examples the corpus takes in")
    requests: str | None = Field(
        None, description="task file without answers: the teacher writes them, the student learns"
    )
    held_out: str = Field(description="task file whose examples are only measured")
    json_schema: str | None = Field(
        None, alias="schema", description="JSON schema (file) of the answers, of kind json"
    )
    refusal: str | None = Field(
        None, description="the answer where there is nothing to answer from, of kind answer"
    )
    first_stage: str | None = Field(
        None,
        description="scores of the search that found the held-out passages (file), of kind "
        "ranking: its own ranking is measured as the model `lexical`, that by the file's "
        "`search_scores` as `search`",
    )
    fusion: float | None = Field(
        None,
        gt=0,
        description="weight of that search's score beside a model's log-odds (default: the model "
        "ranks alone)",
    )

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        if (self.json_schema is not None) != (self.kind == "json"):
            raise ValueError("a task of the kind json, and no other, has a `schema`")
        if self.refusal is not None and self.kind != "answer":
            raise ValueError("`refusal` belongs to tasks of the kind answer")
        if self.first_stage is not None and self.kind != "ranking":
            raise ValueError("`first_stage` belongs to tasks of the kind ranking")
        if self.fusion is not None and self.first_stage is None:
            raise ValueError("`fusion` needs a `first_stage`, whose scores it weighs")
        return self


class TaskList(Section):
    """Tasks without a recipe: what ``seodang evaluate`` is told."""

    tasks: list[TaskConfig] = Field(min_length=1)


class EvaluationConfig(Section):
    """What is measured on the held-out documents besides the distributions."""

    prompts: list[str] = Field([], description="questions of the sample answers")
    max_new_tokens: int = Field(48, gt=0, description="of a sample answer")
    calibration_bins: int = Field(15, gt=1, description="of equal width")


class TaskMargin(Section):
    """By how much, and how surely, the student must be better at a task than a baseline."""

    margin: float = Field(0.0, ge=0, description="above the baseline's figure")
    p: float = Field(0.05, gt=0, le=1, description="the paired test's p must be below this")


class Margins(Section):
    """By how much the student must be better than a baseline."""

    kl: float = Field(0.0, ge=0, description="nats per token below the baseline's KL")
    top1_agreement: float = Field(0.0, ge=0, description="above the baseline's agreement")
    tasks: dict[TaskMetric, TaskMargin] = Field(
        {}, description="tasks' figures, TASK.METRIC, and by how much they must be better"
    )


class GateConfig(Section):
    """What must hold before anything is released."""

    max_kl: float | None = Field(None, gt=0, description="nats per token")
    min_top1_agreement: float | None = Field(
        None, ge=0, le=1, description="share of held-out positions"
    )
    floors: dict[TaskMetric, float] = Field({}, description="least figures of tasks, TASK.METRIC")
    beats: dict[BaselineName, Margins] = Field(
        {}, description="baselines, and by how much they must be beaten"
    )
    within_teacher: dict[TaskMetric, Share] = Field(
        {}, description="by how much a task's figure may be below the teacher's"
    )
    language_gap: dict[TaskMetric, Share] = Field(
        {}, description="by how much the languages' figures of a task may differ"
    )
    no_regression: dict[TaskMetric, Share] = Field(
        {}, description="by how much a task's figure may be below the previous release's"
    )
    previous: str | None = Field(
        None, description="directory of the previous release, for `no_regression`"
    )

    def task_metrics(self) -> list[str]:
        """Every TASK.METRIC that is asked for, once."""
        asked = [*self.floors, *self.within_teacher, *self.language_gap, *self.no_regression]
        asked += [key for margins in self.beats.values() for key in margins.tasks]
        return list(dict.fromkeys(asked))


class ReleasedDataConfig(Section):
    """Which of the training documents, and of their soft labels, are released with the model.

    Only those whose licence allows it are eligible: see :mod:`seodang.release.licenses`.
    """

    share: float = Field(gt=0, le=1, description="of each source's eligible documents")
    seed: int = Field(0, ge=0, description="of the choice, which goes by the documents' digests")


class ReleaseConfig(Section):
    """The released model's name, licence and file formats, and what data goes with it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the model and of its GGUF files"
    )
    license: str = Field(description="SPDX expression, of the released weights")
    description: str = Field("", description="one sentence, for the cards")
    languages: list[str] = Field([], description="ISO 639 codes, for the model card")
    quantizations: list[Quantization] = Field(
        ["f16", "q8_0"], description="GGUF files; f32 and f16 must agree with PyTorch"
    )
    max_quantization_kl: float | None = Field(
        None, gt=0, description="nats per token that any GGUF may lose, on average"
    )
    parity_positions: int = Field(
        48, gt=0, description="held-out positions at which GGUF and PyTorch are compared"
    )
    data: ReleasedDataConfig | None = Field(
        None, description="the part of the training data that is released"
    )


class Recipe(Section):
    """A whole run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="whose runs may share a directory"
    )
    description: str = Field("", description="one sentence, for the report")
    corpus: CorpusConfig = CorpusConfig()
    teacher: TeacherConfig
    soft_labels: SoftLabelsConfig = SoftLabelsConfig()
    student: StudentConfig
    tasks: list[TaskConfig] = Field([], description="what the student is for, and is measured on")
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    release: ReleaseConfig
    quick: dict[str, Any] = Field(
        {}, description="keys (section.key) that `--quick` replaces, and their values"
    )

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> Self:
        if not self.corpus.sources and not any(task.train for task in self.tasks):
            raise ValueError("no `corpus.sources` and no task with a `train` file: nothing to read")
        return self

    @model_validator(mode="after")
    def _labels_fit_the_divergence(self) -> Self:
        if self.student.divergence != "forward-kl" and self.soft_labels.estimator not in (
            "residual",
            "top-k",
        ):
            raise ValueError(
                f"`student.divergence` {self.student.divergence} needs the teacher's probabilities "
                f"of the stored ids, which {self.soft_labels.estimator} labels do not hold: set "
                "`soft_labels.estimator` to residual"
            )
        return self

    @model_validator(mode="after")
    def _gate_asks_for_figures_of_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"`tasks`: several have the name {repeated[0]!r}; rename one")
        known = [f"{task.name}.{m}" for task in self.tasks for m in TASK_METRICS[task.kind]]
        searched = {task.name for task in self.tasks if task.first_stage is not None}
        for name in ("lexical", "search"):
            for key in self.gate.beats.get(name, Margins()).tasks:
                if key.partition(".")[0] not in searched:
                    raise ValueError(
                        f"`gate.beats.{name}`: the task of {key} has no `first_stage` to be "
                        "compared with"
                    )
        for key in self.gate.task_metrics():
            if key not in known:
                raise ValueError(
                    f"`gate`: {key} is no figure of this recipe's tasks; known: "
                    + (", ".join(known) or "none, for there is no task")
                )
        return self

    def packages(self) -> list[PackagePin]:
        """Every package that the recipe names, once."""
        pins = [source.pin() for source in self.corpus.sources] + [self.teacher.pin()]
        return list(dict.fromkeys(pin for pin in pins if pin is not None))
