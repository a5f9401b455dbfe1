"""Whether the ledger's chain holds, and points and pay as written follow from it."""

import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment.command_line import described, named_function
from experiment.errors import InputError
from experiment.files import sha256_file
from experiment.tables import read_lines, table_path
from user_grouping_evaluation_sim.ledger import (
    Account,
    Form,
    accounts_in,
    against_the_rules,
    broken,
    paid,
    replayed,
)
from user_grouping_evaluation_sim.scoring import SCORINGS, Scoring

LEDGER = "ledger"


def check_ledger(
    folder: Path,
    form: Form,
    expected: Iterable[tuple[str, ...]],
    points: pd.DataFrame,
    record: Mapping[str, Any],
    step: float | None,
    *,
    tolerance: Callable[[np.ndarray], np.ndarray],
    own_code: bool = False,
) -> tuple[list[str], list[str]]:
    """(differences, unchecked). expected: the accounts' names. points: points.csv, of those accounts. step: see
    payout.levelled. tolerance: how far points as written may be from these."""
    if not table_path(folder, LEDGER).exists():
        return [], ["ledger.csv: the run wrote none"]
    try:
        if wrong := broken(record, read_lines(folder, LEDGER), form):
            return [f"ledger.csv: {wrong}"], ["points and pay: recomputed only from a ledger whose chain holds"]
        differences: list[str] = []
        unchecked: list[str] = []
        by_account = {tuple(map(str, key)): rows for key, rows in points.groupby(list(form.keys), sort=False)}
        accounts = accounts_in((line.decode() for line in read_lines(folder, LEDGER)), form)
        for names, account in zip(expected, accounts, strict=True):
            rows, title = by_account[names], titled(form, names)
            if account.names != names or list(account.users) != rows["user"].astype(str).tolist():
                return [f"ledger.csv: its run or users are not those of {title}, in points.csv"], []
            scoring = names[form.keys.index("scoring")]
            if ":" in scoring and not own_code:
                unchecked.append(f"points and pay of {title}: --own-code runs {scoring} to recompute them")
                continue
            try:
                function = scoring_of(scoring, record)
                differences += check_account(title, account, rows, record, step, function, tolerance)
            except Exception as error:
                if ":" not in scoring:
                    raise
                # The user's own code: whatever it raises.
                differences.append(str(error) if isinstance(error, InputError) else f"{scoring}: {described(error)}")
        return differences, unchecked
    except (OSError, EOFError, zlib.error, ValueError, KeyError, IndexError) as error:
        return [f"ledger.csv: cannot be read ({type(error).__name__}: {error})"], []


def titled(form: Form, names: Sequence[str]) -> str:
    """An account by its names; numbers say what they count."""
    return ", ".join(f"{key} {name}" if name.isdigit() else name for key, name in zip(form.keys, names, strict=True))


def scoring_of(name: str, record: Mapping[str, Any]) -> Scoring:
    """Raises InputError for one of the user's own, from the current folder, that is not that of the run."""
    scoring: Scoring = named_function("--scoring", name, SCORINGS)
    module, own, _ = name.partition(":")
    if own and sha256_file(str(sys.modules[module].__file__)) != record["code_sha256"][name]:
        raise InputError(f"{name}: is not the code of this run (SHA-256 differs)")
    return scoring


def check_account(
    title: str,
    account: Account,
    rows: pd.DataFrame,
    record: Mapping[str, Any],
    step: float | None,
    scoring: Scoring,
    tolerance: Callable[[np.ndarray], np.ndarray],
) -> list[str]:
    """One combination's points, pay and weights from its rounds and audits. rows: of points.csv, in its order."""
    num_rounds = record["num_rounds"]
    if len(account.rounds) != num_rounds:
        return [f"ledger.csv: {title}: {len(account.rounds)} rounds of {num_rounds}"]
    differences = []
    before, *after = replayed(account, scoring, num_rounds)
    for number, (past, standing) in enumerate(zip(account.rounds, [before, *after], strict=False), start=1):
        if wrong := against_the_rules(past, standing):
            differences.append(f"ledger.csv: {title}: round {number}: {wrong}")
            break
    final = after[-1]
    pay, _ = paid(account, final, num_rounds, step)
    for column, recomputed, allowed in (
        ("points", final.points[0], tolerance(final.points[0])),
        ("pay", pay, np.zeros(len(pay))),
    ):
        written = rows[column].to_numpy(dtype=float)
        wrong_rows = np.flatnonzero(~(np.abs(written - recomputed) <= allowed))
        if len(wrong_rows):
            row = wrong_rows[0]
            more = f" (and {len(wrong_rows) - 1} more)" if len(wrong_rows) > 1 else ""
            differences.append(
                f"points.csv: row {rows.index[row] + 2}: {title}, {account.users[row]}: {column} {written[row]:.12g} "
                f"is {recomputed[row]:.12g} by ledger.csv{more}"
            )
    return differences
