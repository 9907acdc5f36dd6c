"""The plan as tables for people, 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from seodang.foundation.planning.sources import SOURCES, number

WIDTH = 100
_UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def count(value: float) -> str:
    """A number of things: 518.98 B, 20.4 M, 960."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f}"


def scientific(value: float) -> str:
    """A budget: 2.55e24."""
    return f"{value:.2e}".replace("e+", "e")


def operations(value: float) -> str:
    """FLOPs with a prefix: 73.4 GFLOP."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:,.2f} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


def gigabytes(value: float) -> str:
    """Bytes in units of 10^9, with more digits for a small model."""
    size = value / 1e9
    return f"{size:,.1f}" if size >= 10 else f"{size:,.3f}"


def duration(days: float) -> tuple[str, str]:
    """Unit and number: days, or hours and seconds if there are less than one."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24)):
        if days >= size:
            return unit, f"{days / size:,.1f}"
    return "seconds", f"{days * 86_400:,.0f}"


def _cite(*keys: str) -> str:
    return "".join(f"[{number(key)}]" for key in keys)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], sums: int) -> Table:
    """Names left, numbers right, the last column a dim remark; the last ``sums`` rows are sums."""
    table = Table(
        title=f"[bold]{title}[/]",
        title_justify="left",
        show_header=any(columns),
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        padding=(0, 1),
        width=WIDTH - 2,
    )
    for position, name in enumerate(columns):
        remark = position == len(columns) - 1
        table.add_column(
            name,
            justify="left" if position == 0 or remark else "right",
            style="dim" if remark else None,
            ratio=1 if remark else None,
            no_wrap=not remark,
        )
    filled = list(rows)
    for position, row in enumerate(filled):
        is_sum = position >= len(filled) - sums
        table.add_row(*[Text(cell) for cell in row], style="bold" if is_sum else None)
    return table


def _parameters(plan: dict[str, Any]) -> Table:
    found = plan["parameters"]
    rows = [
        (
            part["name"],
            f"{part['total']:,}",
            f"{part['active']:,}",
            f"{part['total'] / found['total']:.1%}",
            "",
        )
        for part in found["components"]
    ]
    rows.append(
        ("all", f"{found['total']:,}", f"{found['active']:,}", "", "exact " + _cite("axk1"))
    )
    return _table("Parameters", ("", "total", "active", "share", ""), rows, sums=1)


_FORMULAS = {
    "attention projections": ("2 a weight", ("dsv2", "kaplan")),
    "attention scores": ("2·heads·(qk + v)·attended positions, a layer", ("palm",)),
    "dense MLP": ("2 a weight", ("kaplan",)),
    "routed experts": ("2 a weight of the experts chosen", ("kaplan",)),
    "shared experts": ("2 a weight", ("kaplan",)),
    "router": ("2 a weight", ("kaplan",)),
    "output head": ("2·width·vocabulary", ("kaplan",)),
}


def _flops(plan: dict[str, Any]) -> Table:
    found = plan["flops_per_token"]
    rows = []
    for name, value in found["components"].items():
        formula, keys = _FORMULAS[name]
        share = f"{value / found['forward']:.1%}"
        rows.append((name, operations(value), share, f"{formula} {_cite(*keys)}"))
    rows.append(("forward", operations(found["forward"]), "", "the sum"))
    if found["multi_token_prediction"]:
        extra = operations(found["multi_token_prediction"])
        rows.append(("multi-token prediction", extra, "", "in training only " + _cite("dsv3")))
    rows.append(
        (
            "training",
            operations(found["training"]),
            "",
            "3 times: backward is twice forward " + _cite("kaplan"),
        )
    )
    title = f"FLOPs of a token, at a context of {found['context']:,}"
    return _table(title, ("", "FLOPs", "share", ""), rows, sums=1)


def _memory(plan: dict[str, Any]) -> Table:
    found, limit = plan["memory_per_device"], plan["memory_per_device"]["device_bytes"]
    engines = (found["fsdp2"], found["megatron"])

    def row(name: str, key: str, remark: str) -> tuple[str, ...]:
        return (name, *(gigabytes(engine[key]) for engine in engines), remark)

    def verdict(key: str) -> str:
        words = [
            f"{name} {'fits' if engine[key] <= limit else 'does not fit'}"
            for name, engine in zip(("FSDP2", "Megatron"), engines, strict=True)
        ]
        return f"of {limit / 1e9:,.0f}: " + ", ".join(words)

    rows = [
        row("weights", "weights", f"FSDP2 4 B sharded, Megatron 2 B whole {_cite('zero')}"),
        row("gradients", "gradients", f"FSDP2 4 B sharded, Megatron 4 B whole {_cite('zero')}"),
        row("optimizer", "optimizer", f"FSDP2 8 B, Megatron 12 B, both sharded {_cite('zero')}"),
        row("gathered", "gathered", f"vocabulary, two layers, a gradient {_cite('zero')}"),
        row("activations, kept", "activations", f"tensor by tensor {_cite('korthikanti')}"),
        row("activations, recomputed", "recomputed", _recomputed(engines)),
        row("all, kept", "total", verdict("total")),
        row("all, recomputed", "total_recomputed", verdict("total_recomputed")),
    ]
    at = plan["layout"]
    shape = " ".join(f"{key.upper()}{at[key]}" for key in ("tp", "pp", "ep", "cp", "dp"))
    stage = "" if at["pp"] == 1 else ", fullest stage"
    title = f"Memory of a device in GB, {shape} on {at['devices']:,}{stage}"
    return _table(title, ("", "FSDP2", "Megatron", ""), rows, sums=2)


def _recomputed(engines: Iterable[dict[str, Any]]) -> str:
    """What is kept then; and where, as the fullest stage may be another one."""
    elsewhere = {
        engine["stage_recomputed"] + 1
        for engine in engines
        if engine["stage_recomputed"] != engine["stage"]
    }
    stage = f"; fullest then: stage {', '.join(map(str, sorted(elsewhere)))}" if elsewhere else ""
    return f"layer inputs {_cite('korthikanti')}{stage}"


def _laws(plan: dict[str, Any]) -> Table:
    found = plan["scaling_laws"]
    low, high = found["granularity_optimum"]
    tian, beyond = _cite("tian"), "" if found["budget_in_fitted_range"] else ", extrapolated"
    rows = [
        (
            "compute-optimal tokens",
            count(found["compute_optimal_tokens"]),
            f"M = 0.1915·C^0.5095, C = M·D {tian}",
        ),
        (
            "Chinchilla's tokens",
            count(found["chinchilla_tokens"]),
            f"20 an active parameter {_cite('chinchilla')}",
        ),
        (
            "FLOPs of a token, here",
            operations(found["non_embedding_flops_per_token"]),
            "M: in training, without vocabulary",
        ),
        (
            "... best for this budget",
            operations(found["optimal_flops_per_token_of_budget"]),
            f"0.1915·C^0.5095 at C = {scientific(found['budget_flops'])}{beyond} {tian}",
        ),
        (
            "granularity",
            f"{found['granularity']:.1f}",
            f"2·width / expert's neurons; best at {low} to {high} {tian}",
        ),
        (
            "activation ratio",
            f"{found['activation_ratio']:.1%}",
            f"experts of a token / of a layer {tian}",
        ),
        (
            "efficiency leverage",
            f"{found['efficiency_leverage']:.1f} x",
            f"compute of an equal dense model / this one's{beyond} {tian}",
        ),
        (
            "learning rate",
            f"{found['learning_rate']:.1e}",
            f"1.1576·C^-0.1529, AdamW{beyond} {tian}",
        ),
        (
            "batch",
            f"{count(found['batch_tokens'])} tokens",
            f"0.0694·C^0.3644{beyond} {tian}",
        ),
        ("vocabulary, here", f"{found['vocabulary']:,}", "rows of the embedding"),
        (
            "... best by IsoFLOPs",
            f"{found['vocabulary_optimum']['isoflops']:,.0f}",
            f"N_v = e^-1.589·C^0.4164, N_nv = e^-2.485·C^0.5 {_cite('tao')}",
        ),
        (
            "... best by derivative",
            f"{found['vocabulary_optimum']['derivative']:,.0f}",
            f"N_v = 3.15 M·(N_nv / 33 M)^0.8354 {_cite('tao')}",
        ),
    ]
    return _table("Scaling laws", ("", "", ""), rows, sums=0)


def _run(plan: dict[str, Any]) -> Table:
    found = plan["run"]
    rows = [
        ("tokens", count(found["tokens"]), found["tokens_are"]),
        ("FLOPs", scientific(found["flops"]), "tokens x training FLOPs of a token"),
        (
            "utilisation",
            f"{found['utilisation']:.1%}",
            f"{found['utilisation_is']}; of {found['peak_flops'] / 1e12:,.0f} TFLOP/s "
            + _cite("nvidia", "palm"),
        ),
        ("tokens a second", f"{found['tokens_per_second']:,.0f}", "on all devices"),
        (*duration(found["days"]), "FLOPs / (devices x peak x utilisation)"),
    ]
    title = f"A run on {found['devices']:,} {found['device']}"
    return _table(title, ("", "", ""), rows, sums=1)


def _published(found: dict[str, Any]) -> Table:
    counted = found["flops_counted"]
    rows = [
        ("FLOPs", scientific(found["flops"]), f"as reported {_cite('axk1')}"),
        ("devices, days", f"{found['devices']:,}, {found['days']}", f"H200 {_cite('axk1')}"),
        (
            "utilisation",
            f"{found['utilisation']:.1%}",
            f"FLOPs / (devices x days x 989 TFLOP/s) {_cite('palm')}",
        ),
        (
            "FLOPs by our count",
            scientific(counted),
            f"{count(found['tokens'])} tokens of three stages: {counted / found['flops']:.0%}; "
            "the report does not say how it counts",
        ),
        (
            "speed of a device",
            operations(found["flops_per_second_of_a_device"]) + "/s",
            f"at its best {_cite('axk1')}; takes {found['devices_at_that_speed']:,.0f} devices on "
            "average, and the run did grow from 1,024 to 1,536",
        ),
    ]
    return _table("The published run", ("", "", ""), rows, sums=0)


def _notes(plan: dict[str, Any]) -> Iterable[RenderableType]:
    assumed, sources = Table.grid(padding=(0, 1)), Table.grid(padding=(0, 1))
    for text in plan["assumptions"]:
        assumed.add_row("·", Text(text))
    for key, text in SOURCES.items():
        sources.add_row(Text(f"[{number(key)}]"), Text(text), style="dim")
    yield from (Text("Assumed", style="bold"), Padding(assumed, (0, 0, 1, 1)))
    yield from (Text("Sources", style="bold"), Padding(sources, (0, 0, 0, 1)))


def _heading(plan: dict[str, Any]) -> Text:
    model = plan["model"]
    name = model["preset"] or "your own shape"
    line = (
        f"{model['layers']} layers, {model['dense_layers']} dense · {model['hidden_size']:,} wide"
        f" · {model['heads']} heads · {model['experts_per_token']} of {model['experts']} experts "
        f"and {model['shared_experts']} shared\n"
        f"cache: {plan['kv_bytes_per_token']:,} bytes a token in bfloat16 {_cite('dsv2')}\n"
    )
    return Text.assemble((f"{name}\n", "bold"), line)


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print all tables, then what was assumed, then the sources."""
    tables = [_parameters(plan), _flops(plan), _memory(plan), _laws(plan), _run(plan)]
    if "published_run" in plan:
        tables.append(_published(plan["published_run"]))
    console.print(Padding(Group(_heading(plan), *tables, *_notes(plan)), (0, 1)), width=WIDTH)
