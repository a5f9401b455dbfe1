"""How the benchmarks measure whole processes and print their lines."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_process(arguments: Sequence[str]) -> tuple[float, float]:
    """Runs `python ARGUMENTS` in the repository; wall seconds and the largest process's peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(arguments)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def report(what: str, ours: float, unit: str, bar: str, other: float | None = None, other_name: str = "") -> None:
    """One line: our figure, the bar, and, where there is one, the alternative and the ratio."""
    line = f"{what}: {ours:.4g} {unit} (bar: {bar})"
    if other is not None:
        line += f"; {other_name}: {other:.4g} {unit}; ratio {other / ours:.3g}"
    print(line, flush=True)
