"""The experiments as whole processes, their models cached: time and memory of the default run and its neighbours.

    python benchmarks/bench_runs.py                                 all of them
    python benchmarks/bench_runs.py user_grouping_evaluation_sim    one

What the language model's alternative takes for a variant is measured by bench_tuning_and_sampling.py.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import report, run_process


def user_grouping(script: str, folder: str) -> None:
    run = run_process([script, "--output-dir", f"{folder}/default", "--jobs", "2"])
    kernel = run_process(
        [script, "--output-dir", f"{folder}/kernel", "--jobs", "2", "--shapley", "kernel", "--kernel-runs", "0"]
    )
    report("default run: wall", run.seconds, "s", "15", kernel.seconds, "validated by shap.KernelExplainer")
    report("default run: peak memory, largest process", run.largest, "MB", "600")
    report("default run: peak memory, all processes", run.memory, "MB", "-")
    run = run_process([script, "--sweep", "--output-dir", f"{folder}/sweep", "--jobs", "2"])
    report("sweep: wall", run.seconds, "s", "150")
    report("sweep: peak memory, all processes", run.memory, "MB", "-")


def language_model(script: str, folder: str, quick: int, default: int) -> None:
    """quick, default: the bars of their times, in seconds."""
    # Fetches and converts the models on a machine that never ran it, so it is not timed.
    run_process([script, "--preset", "quick", "--output-dir", f"{folder}/first"])
    run = run_process([script, "--preset", "quick", "--output-dir", f"{folder}/quick"])
    report("quick preset: wall", run.seconds, "s", str(quick))
    report("quick preset: peak memory, all processes", run.memory, "MB", "-")
    run = run_process([script, "--output-dir", f"{folder}/default", "--jobs", "2"])
    report("default run: wall", run.seconds, "s", str(default))
    report("default run: peak memory, largest process", run.largest, "MB", "-")
    report("default run: peak memory, all processes", run.memory, "MB", "3000")


EXPERIMENTS = {
    "user_grouping_evaluation_sim": user_grouping,
    "point_in_space_sim": partial(language_model, quick=60, default=300),
    "crowd_fine_tuning_sim": partial(language_model, quick=75, default=720),
}


def main() -> None:
    for name in sys.argv[1:] or EXPERIMENTS:
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            EXPERIMENTS[name](f"{Path(name) / 'run.py'}", folder)
        report("--help: wall", run_process([f"{name}/run.py", "--help"]).seconds, "s", "1")


if __name__ == "__main__":
    main()
