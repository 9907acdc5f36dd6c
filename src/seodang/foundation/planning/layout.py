"""How a model is laid out over devices: the degrees of parallelism and the rules they must obey.

The degrees multiply to the number of devices, except the experts' one: expert parallelism reuses
the devices of a pipeline stage, as in Megatron-Core and torchtitan.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism: tensor, pipeline, expert, context, data."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shards(self) -> int:
        """Devices that share what all tokens use: over them ZeRO splits it."""
        return self.cp * self.dp

    @property
    def expert_shards(self) -> int:
        """Devices that hold the same experts: over them ZeRO splits those."""
        return self.tp * self.cp * self.dp // self.ep

    @property
    def is_native(self) -> bool:
        """Whether Seodang's own trainer can do it (``pretraining.expert_parallel``)."""
        return self.dp == self.devices and self.ep in {1, self.devices}

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


# PP16, EP8, CP 4 to 8 on 1,024 devices (arXiv 2601.09200); data parallelism is what remains.
PUBLISHED = Layout(tp=1, pp=16, ep=8, cp=4, dp=16)


def parse_layout(text: str | None, devices: int | None) -> Layout:
    """A layout as the command line gives it: ``tp=1,pp=16,ep=8,cp=4``.

    What is not named is 1, except ``dp``: it takes the devices that remain. Raises ``InputError``
    if the degrees are not whole numbers or do not divide the devices.
    """
    degrees = {field.name: 1 for field in fields(Layout)}
    given = set()
    for part in (text or "").split(","):
        name, equals, value = part.strip().partition("=")
        if not part.strip():
            continue
        if name not in degrees or not equals or not value.isdecimal() or int(value) < 1:
            raise InputError(
                f"--layout {text}: write it as tp=1,pp=16,ep=8,cp=4,dp=16 with whole numbers "
                f"from 1; `{part.strip()}` is not one of these"
            )
        if name in given:
            raise InputError(f"--layout {text}: `{name}` stands there twice")
        given.add(name)
        degrees[name] = int(value)
    if devices is None:
        return Layout(**degrees)
    rest = degrees["tp"] * degrees["pp"] * degrees["cp"]
    if "dp" not in given and devices % rest == 0:
        degrees["dp"] = devices // rest
    layout = Layout(**degrees)
    if layout.devices != devices:
        known = "tp x pp x cp x dp" if "dp" in given else "tp x pp x cp"
        product = layout.devices if "dp" in given else rest
        raise InputError(
            f"--layout {text}: {known} is {product:,}, which does not divide {devices:,} devices"
            if devices % product
            else f"--layout {text}: {known} is {product:,}, but there are {devices:,} devices"
        )
    return layout


def check_layout(config: ModelConfig, layout: Layout, sequence: int) -> None:
    """Raise ``InputError`` with every rule of the model's that the layout breaks."""
    c, at = config, layout
    stage = at.tp * at.cp * at.dp
    rules = [
        (c.heads % at.tp == 0, f"tp ({at.tp}) must divide the heads ({c.heads})"),
        (c.vocabulary % at.tp == 0, f"tp ({at.tp}) must divide the vocabulary ({c.vocabulary:,})"),
        (
            c.intermediate_size % at.tp == 0
            and c.shared_experts * c.expert_intermediate_size % at.tp == 0,
            f"tp ({at.tp}) must divide the neurons of a dense MLP ({c.intermediate_size:,}) and of "
            f"the shared experts ({c.shared_experts * c.expert_intermediate_size:,})",
        ),
        (
            at.pp <= c.layers + c.mtp_layers,
            f"pp ({at.pp}) cannot be more than the layers ({c.layers + c.mtp_layers})",
        ),
        (c.experts % at.ep == 0, f"ep ({at.ep}) must divide the routed experts ({c.experts})"),
        (
            stage % at.ep == 0,
            f"ep ({at.ep}) must divide the devices of a pipeline stage: tp x cp x dp is {stage:,}",
        ),
        (
            at.cp == 1 or sequence % (2 * at.cp) == 0,
            f"cp ({at.cp}) cuts a sequence into 2 x cp pieces, of which each device has an early "
            f"and a late one: {2 * at.cp} must divide the sequence ({sequence:,})",
        ),
        (
            sequence % (at.tp * at.cp) == 0,
            f"tp x cp ({at.tp * at.cp}) must divide the sequence ({sequence:,})",
        ),
    ]
    broken = [rule for holds, rule in rules if not holds]
    if broken:
        raise InputError(f"layout {layout}: " + "; ".join(broken))


def pipeline_stages(config: ModelConfig, layout: Layout) -> list[list[str]]:
    """What each pipeline stage holds, in order.

    Entries are ``embedding``, ``dense``, ``sparse``, ``mtp`` and ``head``. Layers are spread as
    evenly as possible, larger stages first: the last one also computes the loss.
    """
    kinds = ["dense"] * config.dense_layers + ["sparse"] * config.moe_layers
    kinds += ["mtp"] * config.mtp_layers
    size, larger = divmod(len(kinds), layout.pp)
    stages, start = [], 0
    for stage in range(layout.pp):
        end = start + size + (stage < larger)
        stages.append(kinds[start:end])
        start = end
    stages[0].insert(0, "embedding")
    stages[-1].append("head")
    return stages
