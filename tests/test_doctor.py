"""The machine as read from (synthetic) system files, and what `seodang doctor` makes of it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from seodang import doctor, machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def pci(address: str, kind: str, vendor: str, device: str) -> dict[str, str]:
    folder = f"sys/bus/pci/devices/{address}"
    return {
        f"{folder}/class": f"{kind}\n",
        f"{folder}/vendor": f"0x{vendor}\n",
        f"{folder}/device": f"0x{device}\n",
    }


def test_accelerators_are_usable_only_with_a_device_node(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **pci("0000:51:00.0", "0x120000", "1eff", "1220"),
            **pci("0000:d8:00.0", "0x120000", "1eff", "1220"),
            **pci("0000:c7:00.0", "0x120000", "1ed2", "0001"),
            "dev/rbln0": "",
            "dev/rbln1": "",
        },
    )
    rebellions, furiosa = machine.accelerators(root)
    assert (rebellions.vendor, rebellions.usable) == ("Rebellions", True)
    assert rebellions.pci_devices == ["1eff:1220", "1eff:1220"]
    assert rebellions.device_nodes == ["/dev/rbln0", "/dev/rbln1"]
    assert (furiosa.vendor, furiosa.usable) == ("FuriosaAI", False)


def test_device_nodes_alone_are_enough(tmp_path: Path) -> None:
    root = write(tmp_path, {"dev/rngd/npu0mgmt": "", "dev/rngd/npu0pe0": "", "dev/aries0": ""})
    found = {entry.vendor: entry.device_nodes for entry in machine.accelerators(root)}
    assert found == {"FuriosaAI": ["/dev/rngd/npu0mgmt"], "Mobilint": ["/dev/aries0"]}


def test_only_accelerators_are_listed(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **pci("0000:00:02.0", "0x030000", "8086", "46a6"),  # graphics of an Intel laptop
            **pci("0000:01:00.0", "0x040300", "10de", "22bb"),  # sound of an NVIDIA card
            **pci("0000:02:00.0", "0x020000", "15b3", "1021"),  # network
            **pci("0000:03:00.0", "0x120000", "abcd", "0001"),  # accelerator of nobody we know
        },
    )
    assert [entry.vendor for entry in machine.accelerators(root)] == ["PCI vendor abcd"]


def test_cgroup_2_limits_of_every_level_count(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/one\n",
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "sys/fs/cgroup/jobs/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
            "sys/fs/cgroup/jobs/memory.max": f"{1 << 30}\n",
            "sys/fs/cgroup/jobs/one/memory.max": "max\n",
            "sys/fs/cgroup/jobs/one/memory.current": f"{1 << 28}\n",
        },
    )
    assert machine.available_cores(root) == 1
    assert machine.memory(root) == machine.Memory(1 << 30, (1 << 30) - (1 << 28))


def test_cgroup_1_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/\n0::/\n",
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 << 30}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{1 << 30}\n",
        },
    )
    assert machine.available_cores(root) == 1
    assert machine.memory(root) == machine.Memory(2 << 30, 1 << 30)


def test_no_limits_and_no_system_files(tmp_path: Path) -> None:
    assert machine.available_cores(tmp_path) >= 1
    assert machine.memory(tmp_path) is None
    assert machine.accelerators(tmp_path) == []
    assert machine.cpu(tmp_path).model


@pytest.mark.parametrize(
    ("cpuinfo", "model", "features"),
    [
        (
            "model name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile amx_bf16\n",
            "Some Xeon",
            ["AVX2", "AVX-512", "AVX-512 VNNI", "AMX", "AMX BF16"],
        ),
        ("Features\t: fp asimd asimddp sve\n", None, ["NEON", "dot product", "SVE"]),
    ],
)
def test_cpu_features(tmp_path: Path, cpuinfo: str, model: str | None, features: list[str]) -> None:
    found = machine.cpu(write(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert found.features == features
    assert model in (None, found.model)


def test_free_disk_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "runs" / "one") > 0


def test_this_machine_is_diagnosed_as_json(tmp_path: Path) -> None:
    found = doctor.diagnose(tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["ready"]) == {"run", "capture", "release", "serve", "tests", "docs"}
    assert found["ready"] == {command: not lacks for command, lacks in found["missing"].items()}
    assert found["libraries"]["torch"]
    assert found["cpu"]["available_cores"] <= found["cpu"]["cores"]


def installed(site: Path, requires: list[str]) -> None:
    """Metadata of a `seodang` that requires other things, before the real one on the path."""
    lines = ["Metadata-Version: 2.4", "Name: seodang", "Version: 0.0.1"]
    lines += ["Provides-Extra: serve", *(f"Requires-Dist: {line}" for line in requires)]
    write(site, {"seodang-0.0.1.dist-info/METADATA": "\n".join(lines) + "\n"})


def test_what_is_missing_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, ["numpy>=99", 'no-such-engine>=3; extra == "serve"', "pydantic>=2"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.diagnose(tmp_path)
    (lack,) = found["missing"]["capture"]
    assert lack["what"] == f"numpy >=99 (found {metadata.version('numpy')})"
    assert lack["how"] == "pip install --upgrade seodang"
    engine = {"what": "no-such-engine >=3", "how": "pip install --upgrade 'seodang[serve]'"}
    assert engine in found["missing"]["serve"]
    assert engine not in found["missing"]["docs"]
    assert found["chromium"] is None
    assert not found["ready"]["tests"]
    doctor.print_diagnosis(found)
    printed = capsys.readouterr().out
    assert "no-such-engine >=3 (for run, serve)" in printed
    assert "pip install --upgrade 'seodang[serve]'" in printed


def test_packages_that_were_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path))
    found = doctor.diagnose()
    assert found["packages"] == []
    assert not found["ready"]["run"]
    assert any("seodang fetch" in lack["how"] for lack in found["missing"]["run"])


def test_accelerators_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.diagnose(tmp_path)
    found["accelerators"] = [
        {
            "vendor": "Rebellions",
            "pci_devices": ["1eff:1220"],
            "device_nodes": [],
            "models": [],
            "tool": "/usr/bin/rbln-smi",
            "usable": False,
        }
    ]
    doctor.print_diagnosis(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Rebellions ×1 1eff:1220: no device node" in printed
    assert "details: rbln-smi" in printed
