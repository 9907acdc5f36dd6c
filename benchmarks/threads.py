"""Spinning or sleeping OpenMP threads? The same training-like work, alone and beside other work.

    python benchmarks/threads.py

Runs forward and backward passes of linear layers in child processes, with the default wait policy
of OpenMP (spin) and with OMP_WAIT_POLICY=PASSIVE (sleep), on an otherwise idle machine and beside
one busy process per core, and prints the ratio of the wall times (above 1: sleeping is faster).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

WORK = """
import time, torch
layers = torch.nn.Sequential(*[torch.nn.Linear(576, 576) for _ in range(60)])
x = torch.randn(512, 576)
layers(x).sum().backward()
started = time.perf_counter()
for _ in range(5):
    layers(x).sum().backward()
print(time.perf_counter() - started)
"""
BUSY = "while True: pass"
ROUNDS = 5


def seconds(policy: str | None) -> float:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    for name, count in (("idle", 0), ("busy", os.cpu_count() or 1)):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            time.sleep(1)
            pairs = [(seconds(None), seconds("PASSIVE")) for _ in range(ROUNDS)]
        finally:
            for other in others:
                other.kill()
        ratios = sorted(spin / sleep for spin, sleep in pairs)
        middle = statistics.median(ratios)
        print(f"{name}: spin / sleep = {middle:.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
