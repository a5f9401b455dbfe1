"""What the scripts' command lines share: common options, presets, and how errors end."""

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar

from experiment.errors import InputError, RunFailed
from experiment.files import sha256_file
from experiment.parallel import BACKENDS

Settings = TypeVar("Settings", bound="StudySettings")


@dataclass(frozen=True)
class StudySettings:
    """Of a script whose work is not resumed."""

    preset: str = "default"
    """A named set of defaults; options given beside it win."""
    seed: int = 0
    """Everything random follows from it."""
    output_dir: Path | None = None
    """The run's folder. Default: results/<experiment>/<preset> in the repository."""
    jobs: int = field(default_factory=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    """How many processes work at once. The results do not depend on it."""


@dataclass(frozen=True)
class CommonSettings(StudySettings):
    overwrite: bool = False
    """Replace the run that the folder holds."""
    resume: bool = True
    """Go on with an unfinished run of the same settings."""
    figures: bool = True
    """Draw the figures. They take seconds, which count in sweeps of many small runs."""
    backend: str = "loky"
    """Where work runs: loky, threading, dask or ray."""
    scheduler: str | None = None
    """Address of the dask or ray cluster to use."""
    dry_run: bool = False
    """Say what would be done and about how long it would take, and stop."""


# These do not decide the results, so a run may be resumed with others.
NOT_IDENTITY = ("preset", "output_dir", "jobs", "overwrite", "resume", "figures", "backend", "scheduler", "dry_run")


# torch's exceptions, on CUDA and on the CPU, which this module does not import.
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
GO_ON = "finished parts are kept; run the same command to go on"


def run_script(
    module: str, settings: type[Settings], presets: Mapping[str, dict[str, Any]], description: str | None
) -> int:
    """Reads the command line into `settings`, then imports `module` and calls its `main`: --help answers at once.

    Returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted. What the code does not foresee is raised, so
    that Python shows where it happened and exits with code 1.
    """
    _mend_streams()
    go_on = GO_ON if issubclass(settings, CommonSettings) else "run it again"
    os.environ["MPLBACKEND"] = "agg"  # figures need no window system, and a notebook's backend is not installed here
    try:
        given = read_command_line(sys.argv[1:], settings, presets, description)
        check_study(given)
        importlib.import_module(module).main(given)
    except InputError as error:
        return _ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _ended(f"interrupted: {go_on}", 130)
    except RunFailed as error:
        return _ended(f"error: {error}; {go_on}", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
            raise
        return _ended(f"error: not enough memory; {go_on}, perhaps with fewer --jobs", 1)
    except BrokenPipeError:  # nobody reads the help to its end
        _discard_output()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _ended(f"error: {where}{error.strerror or error}; {go_on}", 1)
    return 0


def _ended(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


def tell(line: str) -> None:
    """Prints a line. A reader that went away (`| head -1`) does not end a run: what follows goes nowhere."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mend_streams() -> None:
    """Streams that were closed (`2>&-`) lead nowhere, and no file that a run opens takes their number; what a terminal
    cannot show is escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
        stream = getattr(sys, name)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_command_line(
    arguments: list[str], settings: type[Settings], presets: Mapping[str, dict[str, Any]], description: str | None
) -> Settings:
    """The settings that the arguments give, the preset's for all others. Raises InputError, naming the culprit.

    --help prints the options and raises SystemExit(0).
    """
    import tyro  # not needed where a run's functions are used from Python

    preset = _preset_of(arguments)
    check_name("--preset", preset, presets)
    defaults = settings(**{**presets[preset], "preset": preset})
    for option, value in pairwise(["", *arguments]):
        if not value or (value.startswith("--") and value.endswith("=")):
            raise InputError(f"{value.rstrip('=') or option}: an empty value; give one or leave the option out")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            given, unknown = tyro.cli(
                settings, args=arguments, default=defaults, description=description, return_unknown_args=True
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_first_sentence(complaint.getvalue())) from None
    if unknown:
        raise InputError(_unknown_option(unknown, settings))
    return given


def _first_sentence(complaint: str) -> str:
    """What tyro draws as a box (a title, what is wrong, a rule, help), without the box: what is wrong."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint)  # on a terminal it is coloured
    lines = [line.strip("│ ") for line in plain.splitlines()[1:-1]]
    told = " ".join(takewhile(lambda line: set(line) != {"─"}, lines))
    return f"{told.removeprefix('Error parsing ').rstrip('.')}; see --help"


def _unknown_option(unknown: list[str], settings: type) -> str:
    name = next((word for word in unknown if word.startswith("--")), None)
    if name is None:
        return f"{unknown[0]}: belongs to no option; see --help"
    name = name.partition("=")[0].replace("_", "-")
    near = nearest(name, [f"--{field.name.replace('_', '-')}" for field in fields(settings)])
    return f"{name}: no such option; {f'did you mean {near}?' if near else 'see --help'}"


def _preset_of(arguments: list[str]) -> str:
    """The preset named last, as for every other option."""
    preset = "default"
    for argument, value in pairwise([*arguments, ""]):
        if argument == "--preset" and value:
            preset = value
        elif argument.startswith("--preset="):
            preset = argument.partition("=")[2] or preset
    return preset


def check_name(option: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError where `name` is not known, and suggests the nearest."""
    known = list(known)
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(known)}"
        raise InputError(f"{option} {name}: unknown; {hint}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, whatever its case; None where none is like it."""
    by_case = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1)
    return by_case[near[0]] if near else None


def check_range(option: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InputError where `value` is not within [low, high], or (low, high]."""
    if not (low < value <= high if open_low else low <= value <= high):
        bracket = "(" if open_low else "["
        raise InputError(f"{option} {value}: out of range; must be in {bracket}{low}, {high}]")


def check_study(settings: StudySettings) -> None:
    """Raises InputError for options of a script that cannot be."""
    check_range("--seed", settings.seed, 0, 2**63)
    check_range("--jobs", settings.jobs, 1, 10**6)


def check_common(settings: CommonSettings) -> None:
    """Raises InputError for common options that cannot be."""
    check_study(settings)
    check_name("--backend", settings.backend, BACKENDS)
    if settings.backend == "dask" and settings.scheduler is None:
        raise InputError("--backend dask: needs --scheduler ADDRESS, such as tcp://host:8786")


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """An InputError raised inside begins with the option that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def named_function(option: str, name: str, registry: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The registry's function, or the user's own, named as `module:function` (importable from the current folder)."""
    if ":" not in name:
        check_name(option, name, [*registry, "module:function"])
        return registry[name]
    module_name, _, function_name = name.partition(":")
    # Where the user's own modules lie, for workers too, which get the function by its module's name.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(1, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module is the user's own: whatever it raises
        why = described(error)
        raise InputError(f"{option} {name}: cannot be loaded ({why}); name it as module:function") from None
    if not callable(function):
        raise InputError(f"{option} {name}: is no function; name it as module:function")
    return function  # type: ignore[no-any-return]


def code_sha256(named: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Of the files of the user's own functions among those that are named, by option; InputError for who has none."""
    hashes = {}
    for option, name in ((option, name) for option, names in named.items() for name in names if ":" in name):
        file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
        if file is None:
            raise InputError(f"--{option} {name}: its module is no file; name a function in a file of yours")
        hashes[name] = sha256_file(file)
    return hashes


@contextlib.contextmanager
def blaming(names: Sequence[str]) -> Iterator[None]:
    """Whatever the user's own functions of these names raise in a rehearsal is bad input that says where."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{' '.join(names)}: fails in a rehearsal ({described(error)})") from error


def described(error: Exception) -> str:
    """An error's type, message and place, in one line, for errors of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
