"""How the benchmarks measure whole processes and print their lines."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Measured(NamedTuple):
    """Wall seconds; peak memory in MB of the process and its workers together, and of the largest of them."""

    seconds: float
    memory: float
    largest: float


def run_process(arguments: Sequence[str]) -> Measured:
    """Runs `python ARGUMENTS` in the repository.

    Of the memory of all, what processes share counts once (proportional set size, looked at five times a second).
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0.0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, sum(map(_memory, _family(process.pid))))
        time.sleep(0.2)
    if ended[1]:
        sys.exit(f"failed: {' '.join(arguments)}")
    largest = ended[2].ru_maxrss / 1024
    return Measured(time.perf_counter() - start, max(peak, largest), largest)


def _family(process: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    family = [process]
    for member in family:
        family += parents.get(member, [])
    return family


def _memory(process: int) -> float:
    """Proportional set size, MB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def report(what: str, ours: float, unit: str, bar: str, other: float | None = None, other_name: str = "") -> None:
    """One line: our figure, the bar, and, where there is one, the alternative and the ratio."""
    line = f"{what}: {ours:.4g} {unit} (bar: {bar})"
    if other is not None:
        line += f"; {other_name}: {other:.4g} {unit}; ratio {other / ours:.3g}"
    print(line, flush=True)
