"""``seodang foundation``: plan a teacher of the A.X K1 design, export it, train it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seodang.cli_output import AsJson, print_json, reported
from seodang.errors import InputError

if TYPE_CHECKING:
    from seodang.foundation.model_config import ModelConfig
    from seodang.foundation.planning.layout import Layout

foundation_app = typer.Typer(no_args_is_help=True, help="Build a teacher from raw text.")

RecipeFile = Annotated[
    Path | None, typer.Argument(help="Foundation recipe (YAML), whose `model` is planned.")
]
Preset = Annotated[str | None, typer.Option(help="Shape, instead of a recipe: such as a.x-k1.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override in the recipe: section.key=value.")
]
LayoutText = Annotated[
    str | None, typer.Option("--layout", help="Degrees of parallelism: tp=1,pp=16,ep=8,cp=4,dp=16.")
]
DeviceCount = Annotated[int | None, typer.Option(min=1, help="How many devices.")]
Sequence = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a sequence. Default: 4,096, or the context.")
]


@foundation_app.callback()
def root() -> None:
    """Build a teacher from raw text."""


@foundation_app.command("run")
@reported
def foundation_run(
    recipe: Annotated[Path, typer.Argument(help="Foundation recipe (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Build the teacher: raw text, tokenizer, pretraining, two thinking modes."""
    from seodang.foundation.recipe import load_foundation_recipe

    loaded = load_foundation_recipe(recipe, settings)
    from seodang.foundation.build import build_teacher
    from seodang.stages import say_if_nothing_ran

    built = build_teacher(loaded, recipe.parent, out)
    say_if_nothing_ran(built.stages)
    if as_json:
        print_json(built.to_json())
        return
    for language, loss in built.pretraining["held_out_nats_per_byte"].items():
        print(f"{language:<12} {loss:.3f} nats per byte, held out")
    if built.measured:
        from rich.console import Console

        from seodang.foundation.post_training.modes import table

        Console(emoji=False, highlight=False).print(table(built.measured))
    print(f"teacher      {built.teacher}")


@foundation_app.command("pretrain")
@reported
def foundation_pretrain(
    recipe: Annotated[Path, typer.Argument(help="Foundation recipe (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory of a run whose tokens are finished.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain alone; with torchrun, on many devices.

    torchrun --nproc-per-node 8 -m seodang foundation pretrain RECIPE --out DIR
    """
    from seodang.foundation.recipe import load_foundation_recipe

    loaded = load_foundation_recipe(recipe, settings)
    from seodang.foundation.build import pretrain_alone
    from seodang.training.parallel import is_first_process

    base = pretrain_alone(loaded, out)
    if not is_first_process():
        return
    if as_json:
        print_json({"path": str(base.path), "digest": base.digest, **base.manifest.summary})
    else:
        print(f"{base.path}: {base.digest}")


@foundation_app.command("plan")
@reported
def foundation_plan(
    recipe: RecipeFile = None,
    preset: Preset = None,
    settings: Settings = None,
    layout: LayoutText = None,
    devices: DeviceCount = None,
    device: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "h200",
    sequence: Sequence = None,
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="To train on, such as 1e13. Default: as published, or optimal."),
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Of the device's peak, such as 0.4.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Measured on one device, instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs, memory, scaling laws and days of a training run, before it is started."""
    from seodang.foundation.planning.devices import device_named
    from seodang.foundation.planning.plan import Run, make_plan

    config = chosen_model(recipe, preset, settings)
    run = Run(
        layout=chosen_layout(config, layout, devices),
        device=device_named(device),
        sequence=sequence or min(4096, config.trained_context),
        tokens=tokens,
        utilisation=utilisation,
        tokens_per_second=tokens_per_second,
    )
    plan = make_plan(config, run)
    if as_json:
        print_json(plan)
        return
    from rich.console import Console

    from seodang.foundation.planning.tables import WIDTH, print_plan

    print_plan(plan, Console(width=WIDTH, emoji=False, highlight=False))


@foundation_app.command("export")
@reported
def foundation_export(
    out: Annotated[Path, typer.Option(help="Directory of the files.")],
    recipe: RecipeFile = None,
    preset: Preset = None,
    settings: Settings = None,
    layout: LayoutText = None,
    devices: DeviceCount = None,
    sequence: Sequence = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="To train on, such as 1e13. Default: optimal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the same model and layout for torchtitan, which has pipelines, tensors and FP8."""
    from seodang.foundation.planning.export import write_torchtitan
    from seodang.foundation.planning.scaling_laws import non_embedding_flops, optimal_tokens

    config = chosen_model(recipe, preset, settings)
    length = sequence or min(4096, config.trained_context)
    chosen = write_torchtitan(
        config,
        chosen_layout(config, layout, devices),
        length,
        tokens or optimal_tokens(non_embedding_flops(config, length)),
        out,
    )
    if as_json:
        print_json(chosen)
        return
    assumptions = chosen.pop("assumptions")
    for name, value in chosen.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<24} {shown}")
    for text in assumptions:
        print(f"{'assumed':<24} {text}")


def chosen_model(
    recipe: Path | None, preset: str | None, settings: list[str] | None
) -> ModelConfig:
    """The shape of a recipe or of a preset; raises ``InputError`` unless exactly one is named."""
    from seodang.foundation.model_config import ModelConfig
    from seodang.foundation.presets import PRESETS

    if (recipe is None) == (preset is None):
        raise InputError(f"name a recipe or one --preset of {', '.join(PRESETS)}")
    if recipe is not None:
        from seodang.foundation.recipe import load_foundation_recipe

        return load_foundation_recipe(recipe, settings).model
    if settings:
        raise InputError("--set changes a recipe: name one instead of --preset")
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    return ModelConfig.model_validate({"preset": preset})


def chosen_layout(config: ModelConfig, text: str | None, devices: int | None) -> Layout:
    """The layout that is named; if none is, a.x-k1 gets its published one, others one device."""
    from seodang.foundation.planning.layout import PUBLISHED, parse_layout

    if text is None and devices is None and config.is_published:
        return PUBLISHED
    return parse_layout(text, devices)
