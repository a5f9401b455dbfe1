"""The folder of one run: who may write to it, what is already done, and where the run came from.

A run's work is cut into parts. A part is saved when it is finished (`part`), so that a killed run goes on from there.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import InputError
from experiment.files import replace_atomically

ROOT = Path(__file__).resolve().parents[1]
PARTS = ".parts"
Arrays = dict[str, np.ndarray]


@dataclass
class RunFolder:
    """An open run. `identity` holds all that decides the run's results; `stages` collects seconds by stage."""

    path: Path
    identity: dict[str, Any]
    finished: bool
    stages: dict[str, float] = field(default_factory=dict)

    def part_path(self, name: str) -> Path:
        return self.path / PARTS / name

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to run.json's `seconds`."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def write_json(self, name: str, content: Any) -> None:
        with replace_atomically(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def finish(self, **facts: Any) -> None:
        """Writes run.json, the mark of a complete run, and removes the parts."""
        record = {**self.identity, **facts, **provenance(), "seconds": {k: round(v, 2) for k, v in self.stages.items()}}
        self.write_json("run.json", record)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)


@contextmanager
def open_run(path: str | Path, identity: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """Takes the folder for this process.

    identity: all that decides the results (settings, seed, hashes of the data), JSON types only. A folder that holds
    an equal identity is resumed, or reported as finished.
    Raises InputError where the folder holds another run or other files, another process writes to it, or it cannot
    be written.
    """
    path = Path(path)
    identity = json.loads(json.dumps(identity))
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another --output-dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{path}: another process is writing to this folder; wait or choose --output-dir"
            ) from None
        try:
            held = _held_identity(path)
            if overwrite:
                _clear(path)
                held = None
            others = [child.name for child in path.iterdir() if child.name not in (".lock", PARTS)]
            if held is None and others:
                raise InputError(f"{path}: holds other files ({others[0]}); choose another --output-dir")
            if held is not None and any(held.get(key) != value for key, value in identity.items()):
                key = next(key for key, value in identity.items() if held.get(key) != value)
                raise InputError(
                    f"{path}: holds another run ({key} differs); choose another --output-dir, or --overwrite it"
                )
            finished = (path / "run.json").exists()
            if held is not None and not finished and not resume:
                raise InputError(
                    f"{path}: holds an unfinished run; leave out --no-resume, or --overwrite to start again"
                )
            for stale in path.glob(".*.tmp*"):  # of a process that was killed while it wrote
                stale.unlink()
            run = RunFolder(path, identity, finished)
            if not finished:
                run.write_json(f"{PARTS}/identity.json", identity)
            yield run
        finally:
            (path / ".lock").unlink(missing_ok=True)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _held_identity(path: Path) -> dict[str, Any] | None:
    for name in ("run.json", f"{PARTS}/identity.json"):
        if (path / name).exists():
            try:
                return dict(json.loads((path / name).read_text(encoding="utf-8")))
            except ValueError:
                raise InputError(f"{path / name}: not readable; remove it or choose another --output-dir") from None
    return None


def _clear(path: Path) -> None:
    """Empties a folder that holds a run; refuses to touch one that does not."""
    children = [child for child in path.iterdir() if child.name != ".lock"]
    if children and _held_identity(path) is None:
        raise InputError(f"{path}: holds other files ({children[0].name}) and no run; --overwrite replaces runs only")
    for child in children:
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def save_arrays(path: Path, arrays: Arrays) -> None:
    """A finished part: named arrays, in NumPy's own format, without pickle."""
    with replace_atomically(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> Arrays | None:
    """The part saved at `path`; None where there is none that can be read, so that it is made again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def part(run: RunFolder, name: str, make: Callable[[], Arrays]) -> Arrays:
    """The part `name`, loaded if it was finished before, otherwise made and saved."""
    path = run.part_path(f"{name}.npz")
    arrays = load_arrays(path)
    if arrays is None:
        arrays = make()
        save_arrays(path, arrays)
    return arrays


def hash_of(content: Any) -> str:
    """A short stable name for JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, for run.json."""
    packages = (
        "numpy",
        "pandas",
        "scipy",
        "scikit-learn",
        "joblib",
        "matplotlib",
        "shap",
        "torch",
        "transformers",
        "peft",
    )

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
        return done.stdout.strip() if done and done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
