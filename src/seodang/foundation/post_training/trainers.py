"""TRL's trainers as a stage of Seodang runs them: resumable, repeatable, quiet.

A checkpoint of transformers is complete once its ``trainer_state.json`` is there, which is written
last; one that a kill left without is deleted. What is read back is safetensors, JSON, and tensors
by ``torch.load(weights_only=True)``: transformers unpickles nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seodang.artifact import Artifact, Draft, new_sources, write_atomically
from seodang.causal_lm import CausalLM, copy_tokenizer, load_tokenizer, quiet_transformers
from seodang.errors import InputError, WorkFailed
from seodang.progress import track

if TYPE_CHECKING:
    from transformers import Trainer

CHECKPOINTS = "checkpoints"
LOG = "training.jsonl"
# What the log keeps: not times, and no totals, which begin anew when a run is resumed.
_LOGGED = ("loss", "grad_norm", "learning_rate", "entropy", "reward", "completions/", "clip_ratio/")


def shared_arguments(
    folder: Path, seed: int, checkpoint_steps: int, adam_beta2: float
) -> dict[str, Any]:
    """The training arguments that every stage has.

    float32 on a CPU, bfloat16 products on a GPU; nothing is reported or pushed anywhere.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "seed": seed,
        "data_seed": seed,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": checkpoint_steps,
        "save_total_limit": 1,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",  # other orders begin anew when a run is resumed
        "adam_beta2": adam_beta2,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "dataloader_pin_memory": False,
    }


def load(model: Artifact, folder: Path) -> CausalLM:
    """The model to train in float32: as the last checkpoint below ``folder`` has it, if there is.

    A resuming trainer reads the checkpoint itself, but by the names in memory and without minding
    what is missing: packed experts, which are saved one by one, would silently stay as they were.
    """
    quiet_transformers()
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    loaded = CausalLM.load(model.path if checkpoint is None else checkpoint)
    loaded.tokenizer = load_tokenizer(model.path)
    return loaded


@contextmanager
def trl_imports() -> Iterator[None]:
    """Turn a missing library into an ``InputError`` that says how to get it; drop advice."""
    quiet_transformers()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"post_training needs {error.name}: pip install 'seodang[foundation]'"
        ) from None


def fit(trainer: Trainer, model: CausalLM, draft: Draft, name: str, steps: int) -> None:
    """Train ``steps`` steps, those of the last complete checkpoint among them; save model and log.

    Raises ``WorkFailed`` if the loss stops being finite.
    """
    from transformers import PrinterCallback, TrainerCallback

    checkpoint = last_checkpoint(draft.path / CHECKPOINTS)
    done = 0 if checkpoint is None else _step(Path(checkpoint))
    with track(name, steps, "steps", done) as advance:

        class Show(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                advance(1)

            def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                if not math.isfinite(float(given["logs"].get("loss", 0.0))):
                    raise WorkFailed(
                        f"{name}: the loss is not finite at step {state.global_step}; "
                        "lower the learning rate"
                    )

        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        trainer.add_callback(Show())
        trainer.train(resume_from_checkpoint=checkpoint)
    save(model, draft.path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    lines = [json.dumps(_reproducible(entry), sort_keys=True) + "\n" for entry in entries]
    write_atomically(draft.path / LOG, "".join(lines).encode())


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are deleted."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found.append((_step(checkpoint), str(checkpoint)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint)
    return max(found)[1] if found else None


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"])


def _reproducible(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in entry.items() if key.startswith(_LOGGED)}
    return {"step": entry["step"], **kept}


def save(model: CausalLM, folder: Path) -> None:
    """Write weights, config, and a generation config that ends a turn and a document."""
    network: Any = model.model
    tokenizer = model.tokenizer
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.config.eos_token_id = tokenizer.eos_token_id
    network.config.bos_token_id = tokenizer.bos_token_id
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)


def copy_model_files(source: Path, folder: Path) -> None:
    """All that belongs to a model but its weights."""
    copy_tokenizer(source, folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)


def finish(draft: Draft, model: Artifact, data: Artifact, summary: dict[str, Any]) -> Artifact:
    """The finished stage, without its checkpoints; its sources are those of both."""
    known = model.manifest.sources
    sources = [*known, *new_sources(data.manifest.sources, known)]
    return draft.finish(sources=sources, summary=summary, temporary=[CHECKPOINTS])
