"""Check finished runs: recompute what is cheap, compare hashes, and say what differs.

python -m experiment.verify [--own-code] FOLDER [FOLDER ...]

--own-code: also run functions of the user's own (module:function, from the current folder) that run.json names.
Exit code 0: all agrees. 1: something differs. 2: a folder holds no finished run.
"""

import importlib
import inspect
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from experiment.command_line import tell
from experiment.errors import InputError
from experiment.files import ROOT
from experiment.run_folder import output_hashes, read_record

Differences = list[str]
Unchecked = list[str]


def verify_run(folder: str | Path, *, own_code: bool = False) -> tuple[Differences, Unchecked]:
    """What differs in a run's folder, and what could not be checked, a line each. own_code: run functions of the
    user's own, as run.json names them.

    Raises InputError where the folder holds no finished run of an experiment that has a verification.
    """
    folder = Path(folder)
    record = read_record(folder)
    # Only a package of this repository: a run.json from elsewhere must not name the code that is run.
    experiments = sorted(path.parent.name for path in ROOT.glob("*/verification.py"))
    experiment = record.get("experiment")
    if experiment not in experiments:
        raise InputError(f"{folder / 'run.json'}: experiment {experiment!r}: not one of {', '.join(experiments)}")
    verify: Callable[..., tuple[Differences, Unchecked]]
    verify = importlib.import_module(f"{experiment}.verification").verify
    outputs = dict(record.get("outputs_sha256", {}))
    left_out = []
    for part in sorted({name.partition("/")[0] for name in outputs if "/" in name}):
        if not (folder / part).exists():  # too large to be handed on with the tables
            own = [name for name in outputs if name.startswith(f"{part}/")]
            left_out.append(f"{part}: {len(own)} file{'s are' if len(own) > 1 else ' is'} not here")
            outputs = {name: digest for name, digest in outputs.items() if name not in own}
    missing, differences = compare_outputs(folder, outputs)
    if missing:  # without a table nothing can be recomputed
        return missing, ["numbers: recomputed only where all tables are there"]
    try:
        runs_own_code = own_code and "own_code" in inspect.signature(verify).parameters
        found, unchecked = verify(folder, record, **({"own_code": True} if runs_own_code else {}))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        found, unchecked = [f"the tables or run.json cannot be read ({type(error).__name__}: {error})"], []
    return differences + found, left_out + unchecked


def compare_outputs(folder: Path, written: dict[str, str]) -> tuple[Differences, Differences]:
    """(files that are gone, files whose bytes are others) against hashes by path."""
    found = output_hashes(folder)
    gone = [f"{name}: is gone" for name in written if name not in found]
    changed = [
        f"{name}: not the bytes that the run wrote" for name in written if found.get(name) not in (None, written[name])
    ]
    # Of folders, those that the record knows: older runs did not name their games.
    parts = {"", *(name.rpartition("/")[0].partition("/")[0] for name in written)}
    of_those = [name for name in found if name.rpartition("/")[0].partition("/")[0] in parts]
    added = [f"{name}: not of this run" for name in of_those if written and name not in written]
    return gone, changed + added


def main(arguments: Sequence[str]) -> int:
    folders = [argument for argument in arguments if argument != "--own-code"]
    if not folders or any(argument.startswith("-") for argument in folders):
        tell(__doc__ or "")
        return 0 if set(arguments) & {"-h", "--help"} else 2
    code = 0
    for folder in folders:
        try:
            differences, unchecked = verify_run(folder, own_code="--own-code" in arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
            continue
        for line in differences:
            tell(f"{folder}: {line}")
        for line in unchecked:
            tell(f"{folder}: not checked: {line}")
        tell(f"{folder}: {len(differences)} differences" if differences else f"{folder}: all agrees")
        code = max(code, bool(differences))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
