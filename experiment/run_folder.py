"""The folder of one run: who may write to it, what is already done, and where the run came from.

A run's work is cut into parts. A part is saved when it is finished, so that a killed run goes on from there.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from experiment.errors import InputError
from experiment.files import ROOT, replace_atomically, sha256_file

PARTS = ".parts"
LOCK = ".lock"
IDENTITY, SESSIONS = "identity.json", "sessions.json"
RECORD_OF_THE_RUN = (
    *("python", "packages", "git_commit", "git_dirty", "machine", "command"),
    *("earlier_commits", "seconds"),
)
"""What run.json says of how a run came about, beside its identity and the experiment's own facts."""
Arrays = dict[str, np.ndarray]
UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What NumPy raises at a file of arrays with damaged bytes."""


@dataclass
class RunFolder:
    """An open run. `identity` holds all that decides the run's results.

    What is known of every process that worked on it, also of those that were interrupted: `stages`, the seconds by
    stage (a killed process's last one is lost), and `commits`.
    """

    path: Path
    identity: dict[str, Any]
    finished: bool
    stages: dict[str, float] = field(default_factory=dict)
    commits: list[str | None] = field(default_factory=list)

    def part_path(self, name: str) -> Path:
        return self.path / PARTS / name

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to run.json's `seconds`."""
        self.write_sessions()  # at once: a process that is killed in its first stage has worked on the run too
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start
            self.write_sessions()

    def write_sessions(self) -> None:
        self.write_json(f"{PARTS}/{SESSIONS}", {"seconds": self.stages, "commits": self.commits})

    def write_json(self, name: str, content: Any) -> None:
        with replace_atomically(self.path / name) as temporary:
            # A file name that is not UTF-8 becomes a JSON escape.
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def record(self, **facts: Any) -> dict[str, Any]:
        """All that run.json says, but for the seconds, which go on. facts: the experiment's own."""
        outputs = output_hashes(self.path)
        held = read_record(self.path) if self.finished else {}
        known = {**held.get("left_out_sha256", {}), **held.get("outputs_sha256", {})}
        left_out = {n: digest for n, digest in known.items() if n.startswith("adapters/") and n not in outputs}
        return {
            **self.identity,
            **facts,
            **provenance(),
            "earlier_commits": self.commits[:-1],
            "outputs_sha256": outputs,
            **({"left_out_sha256": left_out} if left_out else {}),  # weights that are not handed on with the tables
        }

    def finish(self, record: dict[str, Any]) -> None:
        """Writes run.json, the mark of a complete run, and removes all parts."""
        self.write_json("run.json", record | {"seconds": {name: round(t, 2) for name, t in self.stages.items()}})
        shutil.rmtree(self.path / PARTS, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises InputError where there is none."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{folder}: holds no finished run (no run.json)") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: not a run's record")
    return record


def output_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a run's tables, weights and finished games or cases, by their path in the folder."""
    patterns = ("*.csv", "*.csv.gz", "[!.]*/[!.]*.npz", "adapters/**/*.safetensors")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


@contextmanager
def open_run(path: str | Path, identity: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """Takes the folder for this process.

    identity: all that decides the results (settings, seed, hashes of the data), JSON types only. A folder that holds
    an equal identity is resumed, or reported as finished.
    Raises InputError where the folder holds another run or other files, another process writes to it, or it cannot
    be written or locked. A run that began here and ends in an InputError leaves nothing behind, but for finished games
    or cases.
    """
    path = Path(path)
    identity = json.loads(json.dumps(identity))
    with _locked(path):
        held = _held_identity(path)
        if overwrite:
            _clear(path)
            held = None
        own = (LOCK, PARTS) if (path / PARTS).is_dir() else (LOCK,)
        others = [child.name for child in path.iterdir() if child.name not in own]
        if held is None and others:
            raise InputError(f"{path}: holds other files ({others[0]}); choose another folder")
        if held is not None and any(held.get(key) != value for key, value in identity.items()):
            key = next(key for key, value in identity.items() if held.get(key) != value)
            raise InputError(f"{path}: holds another run ({key} differs); choose another folder, or overwrite it")
        finished = (path / "run.json").exists()
        if held is not None and not finished and not resume:
            raise InputError(f"{path}: holds an unfinished run; resume it, or overwrite it to start again")
        # Of a process that was killed while it wrote. os.walk, for folders that go away meanwhile.
        for place, _, names in os.walk(path):
            for name in names:
                if name.startswith(".") and ".tmp" in name:
                    (Path(place) / name).unlink(missing_ok=True)
        run = RunFolder(path, identity, finished, *_sessions(path))
        if not finished:
            run.write_json(f"{PARTS}/{IDENTITY}", identity)
        try:
            yield run
        except InputError:
            if held is None and not any(path.glob("[!.]*/[!.]*.npz")):
                _clear(path)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock; a process that was killed holds none. The folder is made, and goes if it stays empty."""
    # Without the fallback to a lock by existence, which a process that is killed on another machine would leave behind.
    lock = filelock.FileLock(path / LOCK, fallback_to_soft=False)
    theirs = os.path.lexists(path / LOCK)  # False for a name that cannot be
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(f"{path}: another process is writing to this folder; wait or choose another") from None
    except (OSError, NotImplementedError) as error:
        if not theirs:  # else the file may be the lock of a process that works
            _leave(path)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path}: cannot be written to and locked ({why}); choose another folder") from None
    try:
        yield
    finally:
        _leave(path)
        lock.release()


def _leave(path: Path) -> None:
    with contextlib.suppress(OSError):
        (path / LOCK).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()


def _sessions(path: Path) -> tuple[dict[str, float], list[str | None]]:
    """(seconds by stage, commits) of the processes that worked on the run so far, this one's commit the last."""
    stages: dict[str, float] = {}
    commits: list[str | None] = []
    for name in (f"{PARTS}/{SESSIONS}", "run.json"):  # the latter where something is added to a finished run
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            held = json.loads((path / name).read_text(encoding="utf-8"))
            stages = dict(held["seconds"])
            commits = list(held["commits"]) if "commits" in held else [*held["earlier_commits"], held["git_commit"]]
            break
    commit = _git("rev-parse", "HEAD")
    return stages, [*(known for known in commits if known != commit), commit]


def _held_identity(path: Path) -> dict[str, Any] | None:
    for name in ("run.json", f"{PARTS}/{IDENTITY}"):
        if (path / name).exists():
            try:
                return dict(json.loads((path / name).read_text(encoding="utf-8")))
            except (ValueError, TypeError, OSError):
                raise InputError(f"{path / name}: not readable; remove it or choose another folder") from None
    return None


def _clear(path: Path) -> None:
    """Empties a folder that holds a run; refuses to touch one that does not.

    The run's identity goes last: a process that is killed in between leaves an unfinished run, not other files.
    """
    children = [child for child in path.iterdir() if child.name not in (LOCK, PARTS)]
    if children and _held_identity(path) is None:
        raise InputError(f"{path}: holds other files ({children[0].name}) and no run; only runs are overwritten")
    identity = path / PARTS / IDENTITY
    if (path / "run.json").exists():
        identity.parent.mkdir(exist_ok=True)
        (path / "run.json").replace(identity)
    for child in [*path.iterdir(), *identity.parent.glob("*")]:
        if child not in (path / LOCK, identity.parent, identity):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    shutil.rmtree(identity.parent, ignore_errors=True)


def save_arrays(path: Path, arrays: Arrays) -> None:
    """A finished part: named arrays, in NumPy's own format, without pickle."""
    with replace_atomically(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> Arrays | None:
    """The part saved at `path`; None where there is none that can be read, so that it is made again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except UNREADABLE:
        return None
    return arrays if all(isinstance(array, np.ndarray) for array in arrays.values()) else None


def hash_of(content: Any) -> str:
    """A short stable name for JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shared_path(path: Path) -> str:
    """A file's path for run.json: within the repository where it lies there, as on every machine; else absolute."""
    path = path.resolve()
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, for run.json."""
    packages = (
        *("numpy", "pandas", "scipy", "numba", "scikit-learn", "joblib", "matplotlib", "shap", "tyro"),
        *("torch", "transformers", "peft", "safetensors", "tokenizers", "gguf"),
    )

    # What runs write is no change of what makes them.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() if done and done.returncode == 0 else None


def _processor() -> str | None:
    """The processor's name: how it multiplies decides a language model's last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
