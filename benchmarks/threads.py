"""How long should OpenMP's threads spin before they sleep? The same work, alone and beside another.

    python benchmarks/threads.py

Runs forward and backward passes of linear layers in child processes: wide ones, as of a student
of 135 million parameters, and narrow ones, as of the experts of a nano model. They wait for each
other as OpenMP does by default (spinning for milliseconds), as with OMP_WAIT_POLICY=PASSIVE
(asleep at once), and as `seodang` has it; prints the others' wall times as multiples of that. The
narrow ones are left out beside a busy process, where every way waits for the scheduler.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

WORK = """
import time, torch
layers = torch.nn.Sequential(*[torch.nn.Linear({width}, {width}) for _ in range(60)])
x = torch.randn({rows}, {width})
layers(x).sum().backward()
started = time.perf_counter()
for _ in range({times}):
    layers(x).sum().backward()
print(time.perf_counter() - started)
"""
SHAPES = {
    "wide": {"width": 576, "rows": 512, "times": 5},
    "narrow": {"width": 96, "rows": 256, "times": 100},
}
OURS = "GOMP_SPINCOUNT=1000"
WAITING = {OURS: {"GOMP_SPINCOUNT": "1000"}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "spin": {}}
BUSY = "while True: pass"
ROUNDS = 3


def seconds(shape: str, waiting: str) -> float:
    """Wall time of the work in a process of its own."""
    known = {name for setting in WAITING.values() for name in setting}
    environment = {k: v for k, v in os.environ.items() if k not in known} | WAITING[waiting]
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(**SHAPES[shape])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> None:
    for name, others, shapes in (("idle", 0, ["wide", "narrow"]), ("beside one", 1, ["wide"])):
        running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        try:
            time.sleep(1)
            for shape in shapes:
                rounds = [{w: seconds(shape, w) for w in WAITING} for _ in range(ROUNDS)]
                ratios = {
                    waiting: statistics.median(r[waiting] / r[OURS] for r in rounds)
                    for waiting in WAITING
                    if waiting != OURS
                }
                shown = ", ".join(f"{w} / {OURS} = {ratio:.2f}" for w, ratio in ratios.items())
                print(f"{name}, {shape}: {shown}", flush=True)
        finally:
            for other in running:
                other.kill()


if __name__ == "__main__":
    main()
