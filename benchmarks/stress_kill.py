"""Kill runs at random moments, run the same command again, and compare the bytes with those of undisturbed runs.

python benchmarks/stress_kill.py                                                   50 kills of each experiment
python benchmarks/stress_kill.py --experiment point_in_space_sim --kills 10

Small sizes; the language model and the mapper are tiny and random. A run is a child of this process, which has imported
everything: so the kills (SIGKILL to the run and all its workers) fall on the work, not on the import of torch. They are
spread evenly over the run's duration, with a random moment in each stretch. Half of them hit a new folder, half a
folder that holds a finished run: one that is overwritten (user grouping, crowd fine-tuning) or gets another target
(point in space).
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiment.command_line import run_script

COMPARED = ("*.csv", "adapters/**/*.safetensors", "training/*.jsonl")
GROUPING = (
    "--num-users 12 --num-groups 3 --num-rounds 150 --num-runs 40 --kernel-runs 0 --grouping random epsilon_greedy "
    "--metric l1 --scoring attributed"
).split()
POINT = (
    "--base-model llama --mapper roberta/ --corpus corpus.csv --neighbours 12 --generations 2 --variants 2 --samples 3 "
    "--epochs 1 --layers 2 --rank 2 --max-new-tokens 8"
).split()
CROWD = (
    "--base-model llama --mapper roberta/ --crowd people.csv --user-column who --text-column said --num-users 3 "
    "--texts-per-user 3 --neighbours 4 --num-rounds 2 --budget 3 --samples 3 --epochs 1 --layers 2 --rank 2 "
    "--max-new-tokens 6"
).split()


@dataclass(frozen=True)
class Scenario:
    """before: a command that is finished first, or none. command: the one that is killed."""

    name: str
    before: Sequence[str]
    command: Sequence[str]


SCENARIOS = {
    "user_grouping_evaluation_sim": (
        Scenario("new", (), GROUPING),
        Scenario("overwritten", [*GROUPING, "--seed", "1"], [*GROUPING, "--overwrite"]),
    ),
    "point_in_space_sim": (
        Scenario("new", (), [*POINT, "--emotions", "joy"]),
        Scenario("target added", [*POINT, "--emotions", "joy"], [*POINT, "--emotions", "fear"]),
    ),
    "crowd_fine_tuning_sim": (
        Scenario("new", (), CROWD),
        Scenario("overwritten", [*CROWD, "--seed", "1"], [*CROWD, "--overwrite"]),
    ),
}


def start(module: object, arguments: Sequence[str], folder: Path) -> int:
    """The process id of a run that writes to the folder, the leader of a process group of its own."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    code = 1
    try:
        os.chdir(folder.parent)
        silence = os.open(os.devnull, os.O_RDWR)
        os.dup2(silence, 1)
        if "STRESS_SHOW" not in os.environ:
            os.dup2(silence, 2)
        sys.argv = ["run.py", *arguments, "--output-dir", str(folder)]
        code = run_script(module.__name__.replace(".run", ".main"), module.Settings, module.PRESETS, None)
    finally:
        os._exit(code)


def finish(module: object, arguments: Sequence[str], folder: Path) -> float:
    """Runs a command to its end; the seconds that it took."""
    began = time.perf_counter()
    _, status = os.waitpid(start(module, arguments, folder), 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"{' '.join(arguments)}: ended with {code}; STRESS_SHOW=1 shows why")
    return time.perf_counter() - began


def killed(module: object, arguments: Sequence[str], folder: Path, seconds: float) -> bool:
    """Starts a command and kills it, and all that it started, after some seconds. Whether it was still running."""
    child = start(module, arguments, folder)
    time.sleep(seconds)
    running = os.waitpid(child, os.WNOHANG) == (0, 0)
    if running:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return running


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for pattern in COMPARED for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def complaint(folder: Path, expected: dict[str, bytes]) -> str:
    """What is wrong with a folder after the second command; empty where nothing is."""
    found = content(folder)
    if differing := [name for name in expected | found if expected.get(name) != found.get(name)]:
        return f"other bytes: {', '.join(differing[:5])}"
    if left := [path.name for path in folder.rglob(".*") if path.name != ".lock"]:
        return f"left over: {', '.join(left[:5])}"
    return "" if (folder / "run.json").exists() else "no run.json"


def stress(experiment: str, kills: int, jobs: int, rng: np.random.Generator, scratch: Path) -> int:
    """Kills the experiment `kills` times; how many of them left no trace in the results."""
    module = importlib.import_module(f"{experiment}.run")
    scenarios = SCENARIOS[experiment]
    expected, durations = [], []
    for number, scenario in enumerate(scenarios):
        folder = scratch / f"undisturbed-{number}"
        if scenario.before:
            finish(module, [*scenario.before, "--jobs", "1"], folder)
            shutil.copytree(folder, scratch / f"before-{number}")
        finish(module, [*scenario.command, "--jobs", str(jobs)], folder)
        expected.append(content(folder))
        again = scratch / f"timed-{number}"  # now that what is cached on disk is cached
        if scenario.before:
            shutil.copytree(scratch / f"before-{number}", again)
        durations.append(finish(module, [*scenario.command, "--jobs", str(jobs)], again))
        if wrong := complaint(again, expected[number]):
            raise SystemExit(f"{experiment}, {scenario.name}: two undisturbed runs differ: {wrong}")
    survived = 0
    for kill in range(kills):
        number = kill % len(scenarios)
        scenario, folder = scenarios[number], scratch / "killed"
        stretch, stretches = kill // len(scenarios), -(-kills // len(scenarios))
        seconds = durations[number] * (stretch + rng.random()) / stretches
        command = [*scenario.command, "--jobs", str(jobs)]
        while True:
            if scenario.before:
                shutil.copytree(scratch / f"before-{number}", folder)
            if killed(module, command, folder, seconds):
                break
            # It had ended: the machine is quicker than it was.
            shutil.rmtree(folder)
            seconds *= 0.9
        parts = sum(name.endswith(".npz") for _, _, names in os.walk(folder / ".parts") for name in names)
        finish(module, command, folder)
        wrong = complaint(folder, expected[number])
        survived += not wrong
        print(
            f"{experiment}, {scenario.name}: killed after {seconds:.2f} of {durations[number]:.2f} s "
            f"with {parts} parts on disk: {wrong or 'same bytes'}",
            flush=True,
        )
        shutil.rmtree(folder)
    print(f"{experiment}: {survived} of {kills}", flush=True)
    return survived


def in_a_child(function: Callable[[], object]) -> None:
    """Runs a function in a process of its own: torch must not have computed anything in one that is forked."""
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the tiny models could not be made")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    survived = 0
    for experiment in given.experiment:
        with tempfile.TemporaryDirectory() as scratch:
            if experiment != "user_grouping_evaluation_sim":
                import torch

                from tests.tiny_models import save_tiny_world

                torch.set_num_threads(1)
                os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
                in_a_child(lambda scratch=scratch: save_tiny_world(Path(scratch)))
            importlib.import_module(f"{experiment}.main")  # here, so that children have it
            survived += stress(experiment, given.kills, given.jobs, np.random.default_rng(given.seed), Path(scratch))
    return 0 if survived == given.kills * len(given.experiment) else 1


if __name__ == "__main__":
    sys.exit(main())
