"""Let torchtitan read an exported file: ``python torchtitan_reads.py DIRECTORY parse|logits``.

Prints one JSON object. Run where torchtitan is importable, which the tests' own process is spared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torchtitan.config.manager import ConfigManager


def read(config: str) -> Any:
    """The exported configuration, through the library's own parser."""
    return ConfigManager().parse_args(["--module", "axk1", "--config", config])


def parse() -> dict[str, Any]:
    """What the parser and the model that it describes come to."""
    config = read("axk1")
    described = config.model_spec.model
    described.update_from_config(config=config)
    with torch.device("meta"):
        model = described.build()
    try:
        read("axk1_fp8")
        fp8 = "read"
    except ValueError as error:
        fp8 = str(error)
    at = config.parallelism
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "modules": sorted({*model.state_dict()}),
        "stages": at.module_fqns_per_model_part,
        "layout": {
            "tp": at.tensor_parallel_degree,
            "pp": at.pipeline_parallel_degree,
            "ep": at.expert_parallel_degree,
            "cp": at.context_parallel_degree,
            "dp": at.data_parallel_shard_degree,
        },
        "steps": config.training.steps,
        "fp8": fp8,
    }


def logits(checkpoint: Path, length: int) -> dict[str, Any]:
    """Log-probabilities of ``length`` tokens with the weights of a Hugging Face directory."""
    from safetensors.torch import load_file

    spec = read("axk1").model_spec
    model = spec.model.build().eval()
    adapter = spec.state_dict_adapter(spec.model, None)
    model.load_state_dict(adapter.from_hf(load_file(checkpoint / "model.safetensors")))
    ids = torch.arange(length)[None] % spec.model.vocab_size
    positions = torch.arange(length)[None]
    with torch.no_grad():
        masks = model.get_attention_masks(positions=positions)
        found = model(ids, positions=positions, attention_masks=masks)
    torch.save(found[0].float().log_softmax(-1), checkpoint / "log_probs.pt")
    return {"length": length}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    sys.path.insert(0, str(directory))
    result = parse() if sys.argv[2] == "parse" else logits(Path(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(result))
