"""Odd surroundings of a run: terminals, closed pipes, notebooks' settings, file systems without locks, no memory."""

import errno
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from experiment import run_folder
from experiment.errors import InputError
from experiment.run_folder import open_run, save_arrays

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
