"""The point-in-space experiment as a whole process, its models cached: default run and quick preset.

Run: python benchmarks/bench_point_in_space_run.py
The alternative's time for a variant is measured by bench_tuning_and_sampling.py.
"""

import tempfile

from benchmarks.measure import report, run_process

SCRIPT = "point_in_space_sim/run.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Fetches and converts the models on a machine that never ran it, so it is not timed.
        run_process([SCRIPT, "--preset", "quick", "--output-dir", f"{folder}/first"])
        run = run_process([SCRIPT, "--preset", "quick", "--output-dir", f"{folder}/quick"])
        report("quick preset: wall", run.seconds, "s", "60")
        report("quick preset: peak memory, all processes", run.memory, "MB", "-")
        run = run_process([SCRIPT, "--output-dir", f"{folder}/default", "--jobs", "2"])
        report("default run: wall", run.seconds, "s", "600")
        report("default run: peak memory, all processes", run.memory, "MB", "3000")
        run = run_process([SCRIPT, "--help"])
        report("--help: wall", run.seconds, "s", "1")


if __name__ == "__main__":
    main()
