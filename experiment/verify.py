"""Check finished runs: recompute what is cheap, compare hashes, and say what differs.

python -m experiment.verify FOLDER [FOLDER ...]

Exit code 0: all agrees. 1: something differs. 2: a folder holds no finished run.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiment.command_line import tell
from experiment.errors import InputError
from experiment.files import ROOT
from experiment.run_folder import output_hashes, read_record

Differences = list[str]
Unchecked = list[str]


def verify_run(folder: str | Path) -> tuple[Differences, Unchecked]:
    """What differs in a run's folder, and what could not be checked, a line each.

    Raises InputError where the folder holds no finished run of an experiment that has a verification.
    """
    folder = Path(folder)
    record = read_record(folder)
    # Only a package of this repository: a run.json from elsewhere must not name the code that is run.
    experiments = sorted(path.parent.name for path in ROOT.glob("*/verification.py"))
    experiment = record.get("experiment")
    if experiment not in experiments:
        raise InputError(f"{folder / 'run.json'}: experiment {experiment!r}: not one of {', '.join(experiments)}")
    verify: Callable[[Path, dict[str, Any]], tuple[Differences, Unchecked]]
    verify = importlib.import_module(f"{experiment}.verification").verify
    outputs = dict(record.get("outputs_sha256", {}))
    weights = [name for name in outputs if name.startswith("adapters/")]
    left_out = []
    if weights and not (folder / "adapters").exists():  # too large to be handed on with the tables
        left_out = [f"adapters: {len(weights)} files are not here"]
        outputs = {name: digest for name, digest in outputs.items() if name not in weights}
    missing, differences = compare_outputs(folder, outputs)
    if missing:  # without a table nothing can be recomputed
        return missing, ["numbers: recomputed only where all tables are there"]
    try:
        found, unchecked = verify(folder, record)
    except (KeyError, ValueError, TypeError) as error:
        found, unchecked = [f"the tables or run.json cannot be read ({type(error).__name__}: {error})"], []
    return differences + found, left_out + unchecked


def compare_outputs(folder: Path, written: dict[str, str]) -> tuple[Differences, Differences]:
    """(files that are gone, files whose bytes are others) against hashes by path."""
    found = output_hashes(folder)
    gone = [f"{name}: is gone" for name in written if name not in found]
    changed = [
        f"{name}: not the bytes that the run wrote" for name in written if found.get(name) not in (None, written[name])
    ]
    added = [f"{name}: not of this run" for name in found if written and name not in written]
    return gone, changed + added


def main(arguments: Sequence[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        tell(__doc__ or "")
        return 0 if set(arguments) & {"-h", "--help"} else 2
    code = 0
    for folder in arguments:
        try:
            differences, unchecked = verify_run(folder)
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
