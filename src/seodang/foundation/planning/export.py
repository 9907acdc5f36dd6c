"""The same model, layout and batch for an engine that goes further than Seodang's own trainer.

torchtitan trains with pipeline and tensor parallelism and in FP8. What is written is a Python file
for its parser (``--module axk1 --config axk1``, or ``axk1_fp8``) and two ways to start it. Nothing
here imports torchtitan; ``tests/test_foundation_export.py`` lets the library read the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seodang.artifact import write_atomically
from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning import scaling_laws
from seodang.foundation.planning.layout import Layout, check_layout, pipeline_stages

TORCHTITAN = "0.3.0"
DEVICES_A_NODE = 8
PIPELINE_DEPTHS = 4  # micro-batches of a step for each stage of the pipeline
WARMUP = 0.01  # share of the steps, as in Tian et al., arXiv 2507.17702, appendix B


@dataclass(frozen=True)
class Batch:
    """Sequences of a step: of each data-parallel device at once, and of all; and the steps."""

    local: int
    total: int
    steps: int


def choose_batch(layout: Layout, sequence: int, tokens: float, flops: float) -> Batch:
    """A step of about the compute-optimal size (Tian et al., equation 3).

    With a pipeline, a device's share is four times as many sequences as there are stages: 1F1B
    then idles for (p - 1) / (4 p + p - 1) of the time, a fifth at most (Narayanan et al.,
    arXiv 2104.04473, section 2.2.1).
    """
    local = PIPELINE_DEPTHS * layout.pp if layout.pp > 1 else 1
    smallest = local * layout.dp
    wanted = scaling_laws.optimal_batch_tokens(flops) / sequence
    total = smallest * max(1, round(wanted / smallest))
    return Batch(local, total, max(1, math.ceil(tokens / (total * sequence))))


def module_names(config: ModelConfig, layout: Layout) -> list[list[str]]:
    """What each pipeline stage holds, by torchtitan's names."""
    names = {"embedding": ["tok_embeddings"], "head": ["norm", "lm_head"]}
    found, layer = [], 0
    for kinds in pipeline_stages(config, layout):
        stage: list[str] = []
        for kind in kinds:
            stage += names.get(kind) or [f"layers.{layer}"]
            layer += kind not in names
        found.append(stage)
    return found


def write_torchtitan(
    config: ModelConfig, layout: Layout, sequence: int, tokens: float, out: Path
) -> dict[str, Any]:
    """Write ``axk1.py``, ``launch.sh`` and ``launch.sbatch`` into ``out``; returns what was chosen.

    ``tokens`` is the length of the run. Multi-token prediction is left out under pipeline and
    context parallelism, which torchtitan does not combine with it. Raises ``InputError`` if the
    layout breaks a rule, or the embeddings are tied.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    check_layout(config, layout, sequence)
    if layout.devices > DEVICES_A_NODE and layout.devices % DEVICES_A_NODE:
        raise InputError(
            f"{layout.devices:,} devices: beyond one node, whole nodes of {DEVICES_A_NODE} are used"
        )
    if config.tied_embeddings:
        raise InputError(
            "torchtitan's DeepSeek-V3 has its own output head: set `tied_embeddings` to false"
        )
    if sequence > config.trained_context:
        raise InputError(
            f"sequence {sequence:,}: only {config.trained_context:,} positions are trained "
            "without YaRN"
        )
    mtp_layers = config.mtp_layers if layout.pp == layout.cp == 1 else 0
    exported = config.model_copy(update={"mtp_layers": mtp_layers})
    flops = tokens * scaling_laws.non_embedding_flops(config, sequence)
    batch = choose_batch(layout, sequence, tokens, flops)
    chosen = {
        "name": config.preset or "axk1",
        "version": TORCHTITAN,
        "model": exported,
        "layout": layout,
        "stages": module_names(exported, layout) if layout.pp > 1 else None,
        "mtp_layers": mtp_layers,
        "sequence": sequence,
        "learning_rate": scaling_laws.optimal_learning_rate(flops),
        "warmup_steps": max(1, round(WARMUP * batch.steps)),
        "local_batch": batch.local,
        "global_batch": batch.total,
        "steps": batch.steps,
    }
    templates = Environment(
        loader=PackageLoader("seodang.foundation.planning", "."),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    text = templates.get_template("torchtitan.py.j2").render(chosen)
    write_atomically(out / "axk1.py", text.encode())
    nodes = -(-layout.devices // DEVICES_A_NODE)
    each = min(layout.devices, DEVICES_A_NODE)
    write_atomically(out / "launch.sh", _torchrun(nodes, each).encode())
    write_atomically(out / "launch.sbatch", _slurm(nodes, each).encode())
    return {
        "path": str(out),
        "engine": f"torchtitan {TORCHTITAN}",
        "devices": layout.devices,
        "layout": str(layout),
        "sequence": sequence,
        "global_batch": batch.total,
        "steps": batch.steps,
        "learning_rate": chosen["learning_rate"],
        "multi_token_prediction": mtp_layers,
        "assumptions": [
            "batch and learning rate: Tian et al., arXiv 2507.17702, equation 3",
            f"warm-up over {WARMUP:.0%} of the steps (appendix B there), decay over the last fifth",
            f"{PIPELINE_DEPTHS} micro-batches a stage of the pipeline, of one sequence each",
            f"nodes of {DEVICES_A_NODE} devices; every layer recomputed",
        ],
    }


_COMMAND = """torchrun --nnodes {nodes} --nproc-per-node {each} \\
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \\
  -m torchtitan.train --module axk1 --config "${{CONFIG:-axk1}}" "$@"
"""


def _torchrun(nodes: int, each: int) -> str:
    where = (
        "# On one node; CONFIG=axk1_fp8 trains in FP8."
        if nodes == 1
        else f"# On each of {nodes} nodes, HEAD being the first one's address."
    )
    return (
        f'#!/bin/sh\n{where}\nHEAD="${{HEAD:-localhost}}"\n'
        'export PYTHONPATH="$(dirname "$0"):$PYTHONPATH"\n'
        + _COMMAND.format(nodes=nodes, each=each)
    )


def _slurm(nodes: int, each: int) -> str:
    return (
        f"#!/bin/sh\n#SBATCH --job-name=axk1 --nodes={nodes} --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={each} --exclusive\n"
        'HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"\n'
        'export HEAD PYTHONPATH="$SLURM_SUBMIT_DIR:$PYTHONPATH"\n'
        "srun " + _COMMAND.format(nodes=nodes, each=each)
    )
