"""Devices that a run can be planned on: peak of bfloat16 products, and memory."""

from __future__ import annotations

from dataclasses import dataclass

from seodang.errors import InputError


@dataclass(frozen=True)
class Device:
    """``peak`` in FLOP/s of dense bfloat16 products, ``memory`` in bytes (NVIDIA data sheets)."""

    name: str
    peak: float
    memory: int


DEVICES = {
    "a100": Device("A100 80 GB", 312e12, 80 * 10**9),
    "h100": Device("H100", 989e12, 80 * 10**9),
    "h200": Device("H200", 989e12, 141 * 10**9),
}


def device_named(name: str) -> Device:
    """The device of that name; raises ``InputError`` if it is not one of those known."""
    if name.lower() not in DEVICES:
        raise InputError(f"--device {name}: the known ones are {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
