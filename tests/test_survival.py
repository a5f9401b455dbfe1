"""Runs that are killed, interrupted, starved of disk or robbed of a worker: finished work stays, the end is the same.

benchmarks/stress_kill.py does the same at many more moments.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from experiment.run_folder import open_run
from tests.tiny_models import save_tiny_world
from tests.warm_command_line import SCRIPTS

GROUPING, POINT, *_ = SCRIPTS
STRATEGIES = """
import os
import time

import numpy as np


def slow(points, num_groups, progress, rng):
    time.sleep(0.02)
    return np.broadcast_to(np.arange(points.shape[1]) % num_groups, points.shape)


def deadly(points, num_groups, progress, rng):
    with open("/proc/self/cmdline") as file:
        if "loky" in file.read() and os.path.exists("die"):
            # In the middle: as soon as the other worker has finished a part.
            with open("die") as name:
                parts = os.path.join(name.read(), ".parts")
            for _ in range(600):
                if any(name.endswith(".npz") and name[0] != "." for _, _, names in os.walk(parts) for name in names):
                    break
                time.sleep(0.05)
            os.kill(os.getpid(), 9)
    return slow(points, num_groups, progress, rng)
"""
SIZES = (
    "--num-users 6 --num-groups 2 --num-rounds 12 --num-runs 3 --kernel-runs 0 --metric l1 --scoring marginal"
).split()
POINT_RUN = (
    "--base-model llama --mapper roberta/ --corpus corpus.csv --neighbours 8 --generations 1 --variants 2 --samples 2 "
    "--epochs 1 --layers 2 --rank 2 --max-new-tokens 4 --jobs 1"
).split()
GO_ON = "finished parts are kept; run the same command to go on"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("survival")
    (home / "matrix.csv").write_text("who,a,b\n" + "".join(f"u{i},{i % 5},{i % 3}\n" for i in range(12)))
    (home / "strategies.py").write_text(STRATEGIES)
    save_tiny_world(home)
    return home


@pytest.fixture
def run(warm, home):
    def call(experiment, folder, *options, parts=0, **more):
        own = ["--preferences", "matrix.csv", *SIZES] if experiment == GROUPING else POINT_RUN
        environment = {"XDG_CACHE_HOME": home / "cache"}
        arguments = [*own, "--output-dir", folder, *options]
        return warm.call(experiment, arguments, home, environment, parts=(parts, folder), **more)

    return call


def content(folder):
    patterns = ("*.csv", "adapters/**/*.safetensors", "training/*")
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


def finished_parts(folder):
    return {path.name: path.read_bytes() for path in folder.rglob(".parts/**/[!.]*.npz")}


@pytest.fixture(scope="module")
def undisturbed(warm, home):
    """Finished runs: user grouping, a language model on joy, and that with another target added."""
    folders = {name: home / f"undisturbed-{name}" for name in ("grouping", "joy", "both")}
    environment = {"XDG_CACHE_HOME": home / "cache"}
    grouping = ["--preferences", "matrix.csv", *SIZES, "--grouping", "random", "strategies:slow", "--jobs", "1"]
    for experiment, arguments, folder in (
        (GROUPING, grouping, folders["grouping"]),
        (POINT, [*POINT_RUN, "--emotions", "joy"], folders["joy"]),
        (POINT, [*POINT_RUN, "--emotions", "fear"], folders["both"]),
    ):
        if folder.name.endswith("both"):
            shutil.copytree(folders["joy"], folder)
        code, _, errors = warm.call(experiment, [*arguments, "--output-dir", folder], home, environment)
        assert code == 0, errors
    return folders


OWN = ["--grouping", "random", "strategies:slow"]  # the audit plays the first


@pytest.mark.parametrize("parts, jobs", [(2, 1), (4, 2)])
def test_killed_grouping_ends_with_the_same_bytes(parts, jobs, run, undisturbed, tmp_path):
    code, _, _ = run(GROUPING, tmp_path / "run", *OWN, "--jobs", jobs, send=signal.SIGKILL, parts=parts)
    assert code == -signal.SIGKILL
    assert len(kept := finished_parts(tmp_path / "run")) >= parts
    assert kept.items() <= finished_parts(tmp_path / "run").items()
    assert run(GROUPING, tmp_path / "run", *OWN, "--jobs", 1)[0] == 0
    assert content(tmp_path / "run") == content(undisturbed["grouping"])


@pytest.mark.parametrize("before, emotion, parts", [(None, "joy", 1), (None, "joy", 6), ("joy", "fear", 3)])
def test_killed_language_models_end_with_the_same_bytes(before, emotion, parts, run, undisturbed, tmp_path):
    folder = tmp_path / "run"
    if before:
        shutil.copytree(undisturbed[before], folder)
    code, _, _ = run(POINT, folder, "--emotions", emotion, send=signal.SIGKILL, parts=parts)
    assert code == -signal.SIGKILL
    assert len(finished_parts(folder)) >= parts
    code, _, errors = run(POINT, folder, "--emotions", emotion)
    assert code == 0, errors
    assert content(folder) == content(undisturbed["both" if before else "joy"])
    assert not (folder / ".parts").exists()


def test_target_whose_addition_was_cut_off_among_the_tables(run, undisturbed, tmp_path):
    """Killed after some tables, or all, were replaced and before run.json was: nothing may be there twice."""
    for replaced in (["comments"], ["comments", "generations", "neighbourhoods", "summary"]):
        folder = tmp_path / str(len(replaced))
        shutil.copytree(undisturbed["joy"], folder)
        for name in replaced:
            shutil.copy(undisturbed["both"] / f"{name}.csv", folder / f"{name}.csv")
        assert run(POINT, folder, "--emotions", "fear")[0] == 0
        assert content(folder) == content(undisturbed["both"])


def test_overwriting_that_was_cut_off_goes_on(run, undisturbed, tmp_path):
    """What _clear may leave behind at any moment: the old identity, and any of the old files."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed["grouping"], folder)
    (folder / ".parts").mkdir()
    (folder / "run.json").rename(folder / ".parts" / "identity.json")
    for path in folder.glob("r*.csv"):
        path.unlink()
    assert run(GROUPING, folder, *OWN, "--jobs", 1, "--overwrite")[0] == 0
    assert content(folder) == content(undisturbed["grouping"])


@pytest.mark.parametrize(
    "experiment, options, name",
    [
        (GROUPING, [*OWN, "--jobs", 2], "grouping"),
        (POINT, ["--emotions", "joy"], "joy"),
    ],
)
def test_interrupted_runs_say_how_to_go_on(experiment, options, name, run, undisturbed, tmp_path):
    code, _, errors = run(experiment, tmp_path / "run", *options, send=signal.SIGINT, parts=2)
    assert code == 130
    assert errors.splitlines()[-1] == f"interrupted: {GO_ON}"
    assert "Traceback" not in errors
    assert len(finished_parts(tmp_path / "run")) >= 2
    assert run(experiment, tmp_path / "run", *options)[0] == 0
    assert content(tmp_path / "run") == content(undisturbed[name])


def test_a_vanished_worker_is_one_line(run, home, tmp_path):
    options = ["--grouping", "random", "strategies:deadly", "--jobs", 2]
    (home / "die").write_text(str(tmp_path / "run"))
    try:
        code, _, errors = run(GROUPING, tmp_path / "run", *options)
    finally:
        (home / "die").unlink()
    assert code == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a worker or the cluster went away (exit codes {SIGKILL(-9)")
    assert line.endswith(GO_ON)
    assert "Traceback" not in errors
    assert finished_parts(tmp_path / "run")
    assert run(GROUPING, tmp_path / "run", *options)[0] == 0


@pytest.mark.parametrize("experiment, options", [(GROUPING, OWN), (POINT, ["--emotions", "joy"])])
def test_a_second_process_is_refused(experiment, options, run, tmp_path):
    with open_run(tmp_path / "run", {"seed": 1}, overwrite=False, resume=True):
        code, _, errors = run(experiment, tmp_path / "run", *options, "--jobs", 1)
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}: another process is writing")
        assert errors.count("\n") == 1


def test_a_finished_game_survives_a_kill_and_another_target(run, undisturbed, tmp_path):
    """Killed when joy's game is finished and fear's is not: joy is in the next command's tables, whatever it asks."""
    folder = tmp_path / "run"
    # In the first target's folder of parts there is nothing left when the second's has some.
    code, _, _ = run(POINT, folder, "--emotions", "fear", "joy", send=signal.SIGKILL, parts=1)
    assert code == -signal.SIGKILL
    assert run(POINT, folder, "--emotions", "joy")[0] == 0
    assert run(POINT, folder, "--emotions", "fear")[0] == 0
    assert content(folder) == content(undisturbed["both"])
    assert not (folder / ".parts").exists()


@pytest.mark.parametrize("largest", [2_000, 12_000], ids=["adapter", "figure"])
def test_files_that_cannot_grow_end_a_run_in_one_line(largest, run, undisturbed, tmp_path):
    """A quota: the first adapter, or the first figure, does not fit."""
    options = ["--emotions", "joy"]
    code, _, errors = run(POINT, tmp_path / "run", *options, largest_file=largest)
    assert code == 1
    assert errors.splitlines()[-1].startswith("error: ")
    assert "too large" in errors.splitlines()[-1] and errors.splitlines()[-1].endswith(GO_ON)
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "run.json").exists()
    assert run(POINT, tmp_path / "run", *options)[0] == 0
    assert content(tmp_path / "run") == content(undisturbed["joy"])


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 60 kB; skipped where one cannot be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_full_disk(run, undisturbed, small_disk):
    options = [*OWN, "--jobs", 1]
    code, _, errors = run(GROUPING, small_disk / "run", *options)
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and last.endswith(GO_ON)
    assert "Traceback" not in errors
    remount(small_disk, "size=50m")
    assert run(GROUPING, small_disk / "run", *options)[0] == 0
    assert content(small_disk / "run") == content(undisturbed["grouping"])


def test_read_only_disk(run, small_disk):
    remount(small_disk, "ro")
    code, _, errors = run(GROUPING, small_disk / "run", *OWN, "--jobs", 1)
    assert code == 2
    assert errors == (
        f"error: {small_disk / 'run'}: cannot be written to and locked (Read-only file system); choose another folder\n"
    )


def test_workers_end_with_the_process_that_started_them(run, home, tmp_path):
    """The group is not killed here, only the run itself, as the system does for want of memory."""
    script = Path(SCRIPTS[GROUPING])
    command = ["--preferences", "matrix.csv", *SIZES, "--num-rounds", "1000", "--jobs", "2", "--output-dir"]
    command = [os.sys.executable, script, *command, tmp_path / "run", "--grouping", "strategies:slow", "random"]
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    workers = wait_for(lambda: workers_of(process.pid), 60)
    process.kill()
    process.wait()
    assert len(workers) >= 1
    assert wait_for(lambda: not any(is_alive(worker) for worker in workers), 30)


def workers_of(parent):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found += [int(path.name)] if "LokyProcess" in (path / "cmdline").read_text() else []
        except OSError:
            continue
    # Both there, and past their start: the watching thread begins with the first task.
    return found if len(found) == 2 and all(threads(worker) > 1 for worker in found) else []


def threads(process):
    return len(list(Path(f"/proc/{process}/task").glob("*")))


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds):
    import time

    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result
