"""The user grouping experiment as a whole process: default run and sweep, beside the study's way to validate.

Run: python benchmarks/bench_grouping_run.py
"""

import tempfile

from benchmarks.measure import report, run_process

SCRIPT = "user_grouping_evaluation_sim/run.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_process([SCRIPT, "--output-dir", f"{folder}/default", "--jobs", "2"])
        kernel = run_process(
            [SCRIPT, "--output-dir", f"{folder}/kernel", "--jobs", "2", "--shapley", "kernel", "--kernel-runs", "0"]
        )
        other = "validated by shap.KernelExplainer, 10,000 samples"
        report("default run: wall", run.seconds, "s", "15", kernel.seconds, other)
        report("default run: peak memory, largest process", run.largest, "MB", "600")
        report("default run: peak memory, all processes", run.memory, "MB", "-")
        run = run_process([SCRIPT, "--sweep", "--output-dir", f"{folder}/sweep", "--jobs", "2"])
        report("sweep: wall", run.seconds, "s", "150")
        report("sweep: peak memory, all processes", run.memory, "MB", "-")
        run = run_process([SCRIPT, "--help"])
        report("--help: wall", run.seconds, "s", "1")


if __name__ == "__main__":
    main()
