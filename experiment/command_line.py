"""What the scripts' command lines share: common options, presets, and how errors end."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from experiment.errors import InputError

Settings = TypeVar("Settings", bound="CommonSettings")


@dataclass(frozen=True)
class CommonSettings:
    preset: str = "default"
    """A named set of defaults; options given beside it win."""
    seed: int = 0
    """Everything random follows from it."""
    output_dir: Path | None = None
    """The run's folder. Default: results/<experiment>/<preset> in the repository."""
    jobs: int = field(default_factory=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    """How many processes work at once. The results do not depend on it."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    resume: bool = True
    """Go on with an unfinished run of the same settings."""


# These do not decide the results, so a run may be resumed with others.
NOT_IDENTITY = ("output_dir", "jobs", "overwrite", "resume", "backend", "scheduler")


def run_script(
    main: Callable[[Settings], None], settings: type[Settings], presets: Mapping[str, dict[str, Any]]
) -> int:
    """Reads the command line into `settings`, runs `main`, and returns the exit code: 0, 2 (bad input) or 130."""
    import tyro

    try:
        preset = _preset_of(sys.argv[1:])
        check_name("--preset", preset, presets)
        defaults = settings(**{**presets[preset], "preset": preset})
        main(tyro.cli(settings, default=defaults, description=sys.modules[main.__module__].__doc__))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished parts are kept; run the same command to go on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}; finished parts are kept", file=sys.stderr)
        return 1
    return 0


def _preset_of(arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--preset="):
            return argument.partition("=")[2]
    return "default"


def check_name(option: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError where `name` is not known, and suggests the nearest."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise InputError(f"{option} {name}: unknown; {hint}")


def check_range(option: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InputError where `value` is not within [low, high], or (low, high]."""
    if not (low < value <= high if open_low else low <= value <= high):
        bracket = "(" if open_low else "["
        raise InputError(f"{option} {value}: out of range; must be in {bracket}{low}, {high}]")


def named_function(option: str, name: str, registry: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The registry's function, or the user's own, named as `module:function` (importable from the current folder)."""
    if ":" not in name:
        check_name(option, name, [*registry, "module:function"])
        return registry[name]
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(1, here)
    try:
        return getattr(importlib.import_module(module_name), function_name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise InputError(f"{option} {name}: cannot be loaded ({error}); name it as module:function") from None
