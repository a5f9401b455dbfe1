"""Run folders, files, the parallel map, and odd surroundings of a run, with real processes, terminals and pipes."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits

from experiment import run_folder
from experiment.command_line import check_name, check_range, code_sha256, named_function
from experiment.errors import InputError, RunFailed
from experiment.files import replace_atomically, sha256_file
from experiment.parallel import parallel_map, reach_cluster_again
from experiment.run_folder import load_arrays, open_run, save_arrays
from experiment.tables import LARGE, read_table, write_lines, write_table

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = {"seed": 1, "names": ("a", "b"), "data": {"x": "y"}}


def opened(path, identity=IDENTITY, *, overwrite=False, resume=True):
    return open_run(path, identity, overwrite=overwrite, resume=resume)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ files


def test_a_table_that_grows_is_packed_and_its_smaller_self_goes(tmp_path):
    small, large = (pd.DataFrame({"x": np.arange(rows)}) for rows in (3, LARGE + 1))
    for frame, file in ((small, "t.csv"), (large, "t.csv.gz"), (small, "t.csv")):
        write_table(frame, tmp_path, "t")
        assert [path.name for path in tmp_path.iterdir()] == [file]
        assert len(read_table(tmp_path, "t")) == len(frame)
    write_lines(["x", "1"], tmp_path, "t", large=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv.gz"]


@pytest.mark.parametrize("text", ["one\rtwo", "\r", 'a "\r", b', "one\r\ntwo", "one\ntwo"])
def test_no_text_shifts_the_rows_of_a_table(text, tmp_path):
    frame = pd.DataFrame({"text": [text, "plain"], "n": [1.5, 2.0]})
    write_table(frame, tmp_path, "t")
    found = read_table(tmp_path, "t", keep_default_na=False)
    assert found["n"].tolist() == [1.5, 2.0] and found["text"].tolist() == [text, "plain"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with replace_atomically(path) as temporary:
        temporary.write_text("one")
        assert temporary.suffix == ".csv"
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), replace_atomically(path) as temporary:
        temporary.write_text("half of tw")
        raise ZeroDivisionError
    assert content(tmp_path) == {"new/table.csv": b"one"}


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_arrays_survive_and_broken_ones_are_made_again(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([np.nan, 1])}
    save_arrays(tmp_path / "p.npz", arrays)
    loaded = load_arrays(tmp_path / "p.npz")
    assert list(loaded) == ["a", "b"]
    np.testing.assert_array_equal(loaded["a"], arrays["a"])
    whole = (tmp_path / "p.npz").read_bytes()
    for broken in (b"", b"PK", whole[:100], whole[:-30], b"text"):
        (tmp_path / "p.npz").write_bytes(broken)
        assert load_arrays(tmp_path / "p.npz") is None
    assert load_arrays(tmp_path / "absent.npz") is None
    np.savez(tmp_path / "p.npz", a=np.array([{"an": "object"}], dtype=object))
    assert load_arrays(tmp_path / "p.npz") is None


def test_a_part_with_any_flipped_bit_is_as_it_was_or_is_none(tmp_path):
    """Among them the marks of encryption and of other compressions, and shapes too large for memory."""
    path = tmp_path / "p.npz"
    held = {"value": np.arange(3.0), "name": np.array(["a", "b"])}
    save_arrays(path, held)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            for name, array in (load_arrays(path) or {}).items():
                assert name not in held or np.array_equal(array, held[name])


# ------------------------------------------------------------------ run folders


def test_parts_outlive_an_interruption_and_go_when_the_run_is_finished(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), opened(folder) as run:
        assert not run.finished
        save_arrays(run.part_path("first.npz"), {"value": np.array(1)})
        with run.stage("work"):
            time.sleep(0.03)
            raise KeyboardInterrupt
    with opened(folder, dict(reversed(IDENTITY.items()))) as run:
        assert not run.finished
        assert load_arrays(run.part_path("first.npz"))["value"] == 1
        with run.stage("work"):
            time.sleep(0.02)
        run.finish(run.record(extra="fact"))
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["seed"] == 1
    assert record["names"] == ["a", "b"]
    assert record["extra"] == "fact"
    assert record["packages"]["numpy"] == np.__version__
    assert record["seconds"]["work"] >= 0.02 + 0.03  # of both processes
    assert record["earlier_commits"] == []
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert record["git_commit"] == (head.stdout.strip() or None)
    with opened(folder) as run:
        assert run.finished


def test_a_process_killed_in_its_first_stage_leaves_its_commit(tmp_path):
    """The record names every commit that worked on the run, also one whose process never ended a stage."""
    script = (
        "import os, sys\n"
        "from experiment import run_folder\n"
        "run_folder._git = lambda *arguments: 'a' * 40\n"  # as if of another commit
        "with run_folder.open_run(sys.argv[1], {'seed': 1}, overwrite=False, resume=True) as run, run.stage('work'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    with opened(tmp_path / "run", {"seed": 1}) as run:
        run.finish(run.record())
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["earlier_commits"] == ["a" * 40] != [record["git_commit"]]
    # So does one that adds to a finished run.
    script = script.replace("'a'", "'b'")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    with opened(tmp_path / "run", {"seed": 1}) as run:
        run.finish(run.record())
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["earlier_commits"] == ["a" * 40, "b" * 40]


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused_and_kept(tmp_path, finished):
    folder = tmp_path / "run"
    with opened(folder) as run:
        (folder / "table.csv").write_text("kept")
        if finished:
            run.finish(run.record())
    before = content(folder)
    for other in ({**IDENTITY, "seed": 2}, {**IDENTITY, "new_setting": 1}):
        with pytest.raises(InputError, match="holds another run"), opened(folder, other):
            pass
    assert content(folder) == before
    if not finished:
        with pytest.raises(InputError, match="unfinished"), opened(folder, resume=False):
            pass
        assert content(folder) == before
    with opened(folder, {**IDENTITY, "seed": 2}, overwrite=True) as run:
        assert not run.finished
        assert not (folder / "table.csv").exists()


def test_a_folder_of_other_files_is_never_touched(tmp_path):
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "one.tex").write_text("words")
    before = content(folder)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="other files"), opened(folder, overwrite=overwrite):
            pass
        assert content(folder) == before
    in_the_way = tmp_path / "file"
    in_the_way.write_text("x")
    with pytest.raises(InputError, match="cannot be written to and locked"), opened(in_the_way):
        pass
    assert in_the_way.read_text() == "x"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("{ not json")
    with pytest.raises(InputError, match="not readable"), opened(tmp_path / "odd"):
        pass


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    folder = tmp_path / "run"
    with opened(folder):
        (folder / ".runs.123.tmp.csv").write_text("ha")
    with opened(folder) as run:
        run.finish(run.record())
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_nothing_remains_of_a_run_that_could_not_start(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError), opened(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_finished_games_outlive_bad_input_that_shows_late(tmp_path):
    with pytest.raises(InputError, match="late"), opened(tmp_path / "run") as run:
        raise InputError("late")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="late"), opened(tmp_path / "run") as run:
        save_arrays(run.path / "games" / "joy.npz", {"values": np.arange(3)})
        raise InputError("late")
    with opened(tmp_path / "run") as run:
        assert not run.finished and load_arrays(run.path / "games" / "joy.npz") is not None


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    script = (
        "import sys, time\n"
        "from experiment.run_folder import open_run\n"
        "with open_run(sys.argv[1], {'seed': 1}, overwrite=False, resume=True):\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "open\n"
        before = content(tmp_path / "run")
        for overwrite in (False, True):
            with (
                pytest.raises(InputError, match="another process"),
                opened(tmp_path / "run", {"seed": 1}, overwrite=overwrite),
            ):
                pass
        assert content(tmp_path / "run") == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    with opened(tmp_path / "run", {"seed": 1}) as run:
        assert not run.finished


# ------------------------------------------------------------------ parallel map


def squared(task):
    return os.getpid(), task**2


@pytest.mark.parametrize("jobs, backend", [(1, "loky"), (2, "loky"), (2, "threading")])
def test_results_come_in_order(jobs, backend):
    results = list(parallel_map(squared, range(7), jobs=jobs, backend=backend))
    assert [square for _, square in results] == [0, 1, 4, 9, 16, 25, 36]
    outside = {process for process, _ in results} - {os.getpid()}
    assert bool(outside) == (jobs > 1 and backend == "loky")


def test_results_come_as_they_are_ready():
    results = parallel_map(lambda task: task, [1, 2, 3], jobs=1)
    assert next(results) == 1


def threads_inside(task):
    from threadpoolctl import threadpool_info

    np.ones((50, 50)) @ np.ones((50, 50))
    return max((pool["num_threads"] for pool in threadpool_info()), default=1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_linear_algebra_has_one_thread(jobs, monkeypatch):
    """Where this process, and what it starts, would have two."""
    get_reusable_executor(jobs).shutdown(wait=True)  # one of another test, which was started with one
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "2")
    with threadpool_limits(2):
        assert threads_inside(0) == 2
        assert set(parallel_map(threads_inside, range(3), jobs=jobs)) == {1}


def refuses(task):
    raise InputError("task 3: one line")


@pytest.mark.parametrize("jobs", [1, 2])
def test_errors_of_a_task_arrive_as_they_are(jobs):
    with pytest.raises(InputError, match=r"^task 3: one line$"):
        list(parallel_map(refuses, [1, 2], jobs=jobs))


def test_threads_drop_what_is_still_to_do():
    begun = []

    def fails(task):
        begun.append(task)
        time.sleep(0.05)
        raise InputError("this cannot be")

    with pytest.raises(InputError, match="this cannot be"):
        list(parallel_map(fails, range(100), jobs=2, backend="threading"))
    assert len(begun) < 50


@pytest.mark.parametrize(
    "backend, scheduler, told",
    [
        ("slurm", None, "backend slurm: unknown"),
        ("dask", None, "needs its scheduler's address"),
        ("dask", "no-such-protocol://here:1", "no dask scheduler answers"),
    ],
)
def test_clusters_that_are_not_there(backend, scheduler, told):
    with pytest.raises(InputError, match=told):
        list(parallel_map(squared, [1, 2], backend=backend, scheduler=scheduler))
    if backend == "dask":  # one that was there keeps what is finished
        with pytest.raises(RunFailed, match=told):
            reach_cluster_again(backend, scheduler)


# ------------------------------------------------------------------ command line helpers


def test_unknown_names_suggest_the_nearest():
    check_name("--metric", "l2", ["l2", "dot"])
    with pytest.raises(InputError, match="--grouping interleavd: unknown; did you mean interleaved"):
        check_name("--grouping", "interleavd", ["random", "interleaved"])
    with pytest.raises(InputError, match="--metric zzz: unknown; choose from l2, dot"):
        check_name("--metric", "zzz", ["l2", "dot"])


def test_ranges():
    check_range("--p", 0, 0, 1)
    check_range("--p", 1, 0, 1, open_low=True)
    for value, open_low in ((-0.1, False), (1.1, False), (0, True), (float("nan"), False), (float("nan"), True)):
        with pytest.raises(InputError, match=r"--p .*: out of range"):
            check_range("--p", value, 0, 1, open_low=open_low)


def test_own_code_is_hashed_by_its_file():
    named = {"metric": ["l2", "tests.tiny_models:save_tiny_world"], "scoring": ["marginal"]}
    digest = sha256_file(ROOT / "tests" / "tiny_models.py")
    assert code_sha256(named) == {"tests.tiny_models:save_tiny_world": digest}
    with pytest.raises(InputError, match="--scoring builtins:max: its module is no file"):
        code_sha256({"scoring": ["builtins:max"]})


def test_own_functions_are_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_strategies.py").write_text("def shout(text):\n    return text.upper()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert named_function("--metric", "my_own_strategies:shout", {})("a") == "A"
    assert named_function("--metric", "len", {"len": len}) is len
    for name in ("my_own_strategies:absent", "no_such_module_here:f", ":f", "my_own_strategies:"):
        with pytest.raises(InputError, match="cannot be loaded"):
            named_function("--metric", name, {})


# ------------------------------------------------------------------ surroundings


TOY = '''
"""A small experiment: tells lines, draws a figure, and fails as it is told to."""
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiment.command_line import CommonSettings, run_script, tell


@dataclass(frozen=True)
class Settings(CommonSettings):
    lines: int = 3
    fail: str = ""


def main(settings):
    from experiment.figures import new_figure, save_figure

    for i in tqdm(range(settings.lines)):
        tell(f"line {i}")
    if settings.fail:
        raise {"cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
               "cuda": type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"),
               "other": RuntimeError("a mistake in the code")}[settings.fail]
    figure, axes = new_figure()
    axes[0, 0].plot([1, 2])
    save_figure(figure, settings.output_dir, "plot")
    tell("done")


if __name__ == "__main__":
    sys.modules["toy"] = sys.modules["__main__"]
    sys.exit(run_script("toy", Settings, {"default": {}}, __doc__))
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A command that runs the toy experiment."""
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(textwrap.dedent(TOY), encoding="utf-8")
    return [sys.executable, str(path), "--output-dir", str(path.parent / "out")]


def test_a_terminal_gets_one_plain_line(toy):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen([*toy, "--lines", "many"], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    said = b""
    try:
        while chunk := os.read(leader, 4096):
            said += chunk
    except OSError:  # how a pseudo-terminal says that the other end is gone
        pass
    os.close(leader)
    assert process.wait() == 2
    assert said.decode() == "error: --lines: invalid literal for int() with base 10: 'many'; see --help\r\n"


def test_a_reader_that_goes_away_does_not_end_a_run(toy, tmp_path):
    process = subprocess.Popen(
        [*toy, "--output-dir", tmp_path, "--lines", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0
    assert "Error" not in errors and "Traceback" not in errors
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(toy, tmp_path, closed):
    command = " ".join([*toy, "--output-dir", str(tmp_path), closed])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-backend"])
def test_figures_need_no_window_system(toy, tmp_path, backend):
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(
        [*toy, "--output-dir", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("kind, told", [("cpu", "not enough memory"), ("cuda", "not enough memory"), ("other", None)])
def test_no_memory_is_said_in_a_line(toy, kind, told):
    done = subprocess.run([*toy, "--fail", kind], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    if told is None:  # what the code does not foresee is not hidden
        assert last == "RuntimeError: a mistake in the code"
    else:
        assert last.startswith(f"error: {told}") and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_that_cannot_lock_is_said_so(tmp_path, monkeypatch, number):
    """Lustre without the flock option, some NFS."""
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(InputError, match=os.strerror(number)),
        open_run(tmp_path / "run", {}, overwrite=False, resume=True),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_begins_and_proves_impossible_leaves_nothing(tmp_path):
    """An InputError after parts were finished: of a run that began here nothing stays, of an earlier one all does."""
    folder = tmp_path / "run"

    def impossible():
        with open_run(folder, {"seed": 1}, overwrite=False, resume=True) as run:
            save_arrays(run.part_path("first.npz"), {})
            raise InputError("this cannot be")

    with pytest.raises(InputError, match="this cannot be"):
        impossible()
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), open_run(folder, {"seed": 1}, overwrite=False, resume=True) as run:
        save_arrays(run.part_path("second.npz"), {})
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="this cannot be"):
        impossible()
    assert (folder / run_folder.PARTS / "second.npz").exists()
