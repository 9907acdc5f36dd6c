"""Expert parallelism: each process keeps some of the routed experts, and tokens travel to them.

The exchange is that of ``transformers`` (``AllToAllEP``: an all-to-all there, one back). Storage is
that of FSDP2, which shards stacked experts by expert too; what differs is that FSDP gathers the
weights of a layer before it computes, and this leaves them where they are.
"""

from __future__ import annotations

import torch

from seodang.errors import InputError
from seodang.foundation.pretraining.module import Pretraining
from seodang.training.parallel import Processes

_PLAN = {
    "mlp.experts.gate_up_proj": "grouped_gemm",
    "mlp.experts.down_proj": "grouped_gemm",
    "mlp.experts": "ep_dispatch_experts",
}


def spread_experts(module: Pretraining, processes: Processes) -> list[torch.nn.Parameter]:
    """Spread the experts of every layer over all processes, in place; gives their parameters.

    FSDP must leave these alone. Their gradients are averaged, like those of all other parameters.
    Raises ``InputError`` if the processes do not divide the experts, or ``transformers`` cannot.
    """
    if processes.count == 1:
        return []
    experts = module.model.config.n_routed_experts
    if experts % processes.count:
        raise InputError(
            f"model.experts ({experts}) must be a multiple of the {processes.count} processes "
            "that share them: start another number, or set pretraining.expert_parallel to false"
        )
    try:
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError:
        raise InputError(
            "pretraining.expert_parallel needs a newer transformers (5.23 has it); install that, "
            "or set it to false"
        ) from None
    from torch.distributed.device_mesh import init_device_mesh

    kind = processes.device.type
    everyone = init_device_mesh(kind, (processes.count,))
    alone = init_device_mesh(kind, (processes.count, 1), mesh_dim_names=("ep", "tp"))["tp"]
    spread: list[torch.nn.Parameter] = []
    for name, part in module.named_modules():
        if name.endswith("mlp.experts"):
            plan = {name + key.removeprefix("mlp.experts"): style for key, style in _PLAN.items()}
            apply_expert_parallelism(module, everyone, alone, plan, "all_to_all")
            spread += part.parameters()
    for parameter in spread:
        # The loss of each process is scaled for an average over them; here it is a sum.
        parameter.register_hook(lambda gradient: gradient / processes.count)
    return spread
