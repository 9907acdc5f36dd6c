"""What this machine is: its processor, memory, disk and accelerators, read from the system's files.

Every reader takes the ``root`` below which those files lie, so that another machine's can be read.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")

# Linux's name of a CPU flag (x86 and Arm) -> the name people know it by.
_CPU_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_tile": "AMX",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
    "sve2": "SVE2",
    "sme": "SME",
}


@dataclass(frozen=True)
class Cpu:
    """A processor: its name, its cores, those this process may use, and its features."""

    model: str
    architecture: str
    cores: int
    available_cores: int
    features: list[str]


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: what this process may use in all, and what is free now."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Accelerators:
    """The accelerators of one vendor.

    ``pci_devices`` are ``vendor:device`` ids found on the bus, ``device_nodes`` what their driver
    offers to this process: without a node, a device is there and cannot be used.
    """

    vendor: str
    pci_devices: list[str]
    device_nodes: list[str]
    models: list[str]
    tool: str | None

    @property
    def usable(self) -> bool:
        """Whether the driver offers at least one device to this process."""
        return bool(self.device_nodes)


@dataclass(frozen=True)
class _Vendor:
    name: str
    pci_id: str
    nodes: tuple[str, ...]
    tools: tuple[str, ...]
    # PCI base classes to look at: 03 display, 12 processing accelerator.
    classes: tuple[str, ...] = ("03", "12")


# PCI vendor ids: the PCI ID repository; Rebellions, FuriosaAI, Mobilint and DEEPX: the labels and
# device paths of the vendors' own Kubernetes operators and driver guides.
_VENDORS = (
    _Vendor("NVIDIA", "10de", ("dev/nvidia[0-9]*",), ("nvidia-smi",)),
    _Vendor("AMD", "1002", ("dev/kfd",), ("amd-smi", "rocm-smi")),
    _Vendor("Intel", "8086", ("dev/accel/accel[0-9]*",), ("xpu-smi",), ("12",)),
    _Vendor("Intel Gaudi", "1da3", ("dev/accel/accel[0-9]*", "dev/hl[0-9]*"), ("hl-smi",)),
    _Vendor("Rebellions", "1eff", ("dev/rbln[0-9]*",), ("rbln-smi", "rbln-stat")),
    _Vendor("SAPEON", "1f56", (), ()),
    _Vendor(
        "FuriosaAI", "1ed2", ("dev/rngd/npu[0-9]*mgmt", "dev/npu[0-9]*_mgmt"), ("furiosa-smi",)
    ),
    _Vendor("Mobilint", "209f", ("dev/aries[0-9]*", "dev/regulus-npu*"), ("mobilint-cli",)),
    _Vendor("DEEPX", "1ff4", ("dev/dxrt[0-9]*",), ("dxrt-cli",)),
)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cgroup_values(controller: str, name: str, root: Path) -> list[str]:
    """A cgroup file of this process's own group and of every group above it, v1 and v2."""
    values = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
        base = root / "sys/fs/cgroup"
        if hierarchy != "0":
            if controller not in controllers.split(","):
                continue
            base /= controller
        group = base / path.strip("/")
        groups = [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
        values += [value for folder in groups if (value := _read(folder / name))]
    return values


def available_cores(root: Path = _ROOT) -> int:
    """How many cores this process may keep busy: its affinity, and its cgroup's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    limits = [tuple(value.split()) for value in _cgroup_values("cpu", "cpu.max", root)]
    quotas = _cgroup_values("cpu", "cpu.cfs_quota_us", root)
    limits += zip(quotas, _cgroup_values("cpu", "cpu.cfs_period_us", root), strict=False)
    for quota, period in limits:
        if quota.isdigit():  # no limit is "max" in version 2 and -1 in version 1
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def cpu(root: Path = _ROOT) -> Cpu:
    """The processor; an unknown model is named by its architecture."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        available_cores=available_cores(root),
        features=[name for flag, name in _CPU_FEATURES.items() if flag in flags],
    )


def memory(root: Path = _ROOT) -> Memory | None:
    """Main memory, within the limit of this process's cgroup; None where neither can be read."""
    fields = {}
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()[0] if value.split() else ""
        if number.isdigit():
            fields[key] = int(number) * 1024
    if "MemTotal" not in fields:
        return None
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields.get("MemFree", 0))
    limits = _cgroup_values("memory", "memory.max", root)
    limits += _cgroup_values("memory", "memory.limit_in_bytes", root)
    limit = min((int(value) for value in limits if value.isdigit()), default=total)
    if limit < total:
        used = _cgroup_values("memory", "memory.current", root)
        used += _cgroup_values("memory", "memory.usage_in_bytes", root)
        available = min(available, max(0, limit - int(used[0])) if used else limit)
        total = limit
    return Memory(total_bytes=total, available_bytes=available)


def _pci_devices(root: Path) -> list[tuple[str, str, str]]:
    """(base class, vendor, device) of every device on the PCI bus, in lower-case hexadecimal."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind, vendor, model = (_read(device / name) for name in ("class", "vendor", "device"))
        found.append((kind[2:4], vendor.removeprefix("0x"), model.removeprefix("0x")))
    return found


def _nvidia_models(tool: str) -> list[str]:
    """Name, memory and driver of every NVIDIA GPU, as nvidia-smi gives them."""
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [tool, *query], check=False, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    models = []
    for line in done.stdout.splitlines():
        name, _, rest = line.partition(",")
        memory_size, _, driver = rest.partition(",")
        models.append(f"{name.strip()}, {memory_size.strip()}, driver {driver.strip()}")
    return models


def accelerators(root: Path = _ROOT) -> list[Accelerators]:
    """The accelerators found on the PCI bus or as device nodes, one entry per vendor."""
    bus = _pci_devices(root)
    found = []
    for vendor in _VENDORS:
        devices = [
            f"{owner}:{device}"
            for kind, owner, device in bus
            if owner == vendor.pci_id and kind in vendor.classes
        ]
        nodes = sorted(
            {
                "/" + str(node.relative_to(root))
                for pattern in vendor.nodes
                for node in root.glob(pattern)
            }
        )
        # Nodes below /dev/accel are shared by several vendors: only the bus tells whose they are.
        if not devices and (not nodes or nodes[0].startswith("/dev/accel")):
            continue
        tool = next((path for name in vendor.tools if (path := shutil.which(name))), None)
        models = _nvidia_models(tool) if tool and vendor.name == "NVIDIA" else []
        found.append(Accelerators(vendor.name, devices, nodes, models, tool))
    known = {vendor.pci_id for vendor in _VENDORS}
    for owner in sorted({owner for kind, owner, _ in bus if kind == "12"} - known):
        devices = [f"{owner}:{device}" for kind, o, device in bus if o == owner and kind == "12"]
        found.append(Accelerators(f"PCI vendor {owner}", devices, [], [], None))
    return found


def free_disk(path: Path) -> int:
    """Bytes free for this user on the file system of ``path``, or of its nearest parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
