"""The ledger: what a coordinator publishes of a run, so that everybody can recompute every point and pay.

A row a round and candidate, then what was audited for the pay. Every row names the SHA-256 of the row before it, the
first one that of what decides the run, and the last row says that it is the last: no row can be changed, moved, added
or left out unnoticed. Numbers read back exactly. Neither the users' vectors nor the expert are needed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from user_grouping_evaluation_sim import payout
from user_grouping_evaluation_sim.competition import NONE, Played, group_weights, merged_weights_of
from user_grouping_evaluation_sim.grouping import sums_by_group
from user_grouping_evaluation_sim.scoring import Round, Scoring, Standing

ENTRY = ("entry", "round", "group", "members", "weights", "reward", "place", "taken", "improved", "previous")
"""Columns behind those that name an account.

entry: candidate, or what was audited: alone (each member's reward), everybody, gained (see payout.py), or end.
group: from 1; 0 merges the whole crowd. members: ids, %-encoded where they hold more than letters, digits and -._~.
weights, reward: of the members in their order, one number where all are equal. place: of the candidate, as they were
paid, from 1."""
EVERYBODY = "*"


@dataclass(frozen=True)
class Form:
    """Of an experiment's ledgers. keys: the columns that name an account, "scoring" among them. beginning: what of
    run.json the first row follows from."""

    keys: tuple[str, ...]
    beginning: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.keys, *ENTRY)

    @property
    def header(self) -> str:
        return ",".join(self.columns)

    @property
    def end(self) -> str:
        """The last row, but for its SHA-256."""
        return ",".join([*[""] * len(self.keys), "end", *[""] * (len(ENTRY) - 2)])


FORM = Form(
    ("grouping", "metric", "scoring", "run"),
    (
        *("seed", "num_users", "num_groups", "num_rounds", "num_runs", "delta", "error_probability"),
        *("evaluation_noise", "absent", "grouping", "metric", "scoring", "data_sha256", "code_sha256"),
    ),
)
"""Of this experiment's."""
CLOSE = 1e-6  # relative: weights that differ by less do so by rounding errors of other machines
NOTHING = 1e-9  # the same of weights near 0
MOST_NUMBERS = 10_000_000  # members and weights; a longer ledger is not written: of 100,000 users it would be 0.1 GB


@dataclass(frozen=True)
class Account:
    """What one run of one combination shows. names: of a form's keys. users: n ids. rounds: of R = 1. alone: (1, n),
    everybody, gained: (1,), the audits that payout.pay asks for."""

    names: tuple[str, ...]
    users: tuple[str, ...]
    rounds: tuple[Round, ...]
    alone: np.ndarray
    everybody: np.ndarray
    gained: np.ndarray


def recorded(step: Played) -> dict[str, np.ndarray]:
    """A round's row of each array that rounds_of takes, of the first run, and of `taken`."""
    past = step.round
    groups, count = past.rewards.shape[1], past.order.shape[1]
    rewards, order = np.full(groups + 1, np.nan), np.full(groups + 1, NONE)
    rewards[:groups], order[:count] = past.rewards[0], past.order[0]
    merged = np.zeros(past.labels.shape[1])
    if past.merged_weights is not None and past.merged_reward is not None:
        merged, rewards[groups] = past.merged_weights[0], past.merged_reward[0]
    return {
        "labels": past.labels[0],
        "weights": past.weights[0],
        "rewards": rewards,
        "improved": past.improved[0],
        "order": order,
        "merged_weights": merged,
        "taken": step.taken[0],
    }


def rounds_of(
    labels: np.ndarray,
    weights: np.ndarray,
    rewards: np.ndarray,
    improved: np.ndarray,
    order: np.ndarray,
    merged_weights: np.ndarray,
) -> tuple[Round, ...]:
    """The rounds of one run from arrays over its rounds, in the form of vector_world.Trace."""
    rounds = []
    for t in range(len(labels)):
        merged = slice(t, t + 1) if np.isfinite(rewards[t, -1]) else None
        rounds.append(
            Round(
                labels[t][None],
                weights[t][None],
                rewards[t, :-1][None],
                improved[t][None],
                order[t][order[t] != NONE][None],
                None if merged is None else merged_weights[merged],
                None if merged is None else rewards[merged, -1],
            )
        )
    return tuple(rounds)


# ---------------------------------------------------------------- writing


def numbers_in(accounts: Iterable[Account]) -> int:
    """How long their ledger is: members and weights of all rounds."""
    return sum(2 * len(account.users) * len(account.rounds) for account in accounts)


def ledger_lines(settings: Mapping[str, Any], accounts: Iterable[Account], form: Form = FORM) -> Iterator[str]:
    """The ledger's lines. settings: of the run, as in run.json."""
    yield form.header
    previous = _sha256(beginning_of(settings, form))
    texts = (",".join(row) for account in accounts for row in rows_of(account))
    for text in _then(texts, form.end):
        line = f"{text},{previous}"
        yield line
        previous = _sha256(line.encode())


def beginning_of(settings: Mapping[str, Any], form: Form = FORM) -> bytes:
    """What the first row names the SHA-256 of."""
    return json.dumps({name: settings[name] for name in form.beginning}, sort_keys=True).encode()


def rows_of(account: Account) -> Iterator[list[str]]:
    """An account's rows, but for the previous row's SHA-256."""
    key = [quote(name, safe=":") for name in account.names]
    ids = np.array([quote(user, safe="") for user in account.users], dtype=object)
    for number, past in enumerate(account.rounds, start=1):
        groups = past.rewards.shape[1]
        place = past.order[0].argsort() + 1
        by_group = np.argsort(past.labels[0], kind="stable")
        sizes = np.bincount(past.labels[0], minlength=groups)
        candidates = [
            (group + 1, " ".join(ids[members]), past.weights[0, members], past.rewards[0, group])
            for group, members in enumerate(np.split(by_group, sizes.cumsum()[:-1]))
        ]
        if past.merged_weights is not None and past.merged_reward is not None:
            candidates.append((0, EVERYBODY, past.merged_weights[0], past.merged_reward[0]))
        for candidate, (group, members, weights, reward) in enumerate(candidates):
            taken = past.improved[0] and past.order[0, 0] == candidate
            shown = [members, _written(weights), _written(reward), str(place[candidate])]
            yield [*key, "candidate", str(number), str(group), *shown, _yes(taken), _yes(past.improved[0])]
    audits = {"alone": account.alone, "everybody": account.everybody, "gained": account.gained}
    for entry, values in audits.items():
        members = {"alone": " ".join(ids), "everybody": EVERYBODY, "gained": ""}[entry]
        yield [*key, entry, "", "", members, "", _written(values), "", "", ""]


def _then(items: Iterable[str], last: str) -> Iterator[str]:
    yield from items
    yield last


def _written(numbers: np.ndarray) -> str:
    """Numbers that read back exactly, or one where all are equal."""
    texts = [repr(number) for number in np.ravel(numbers).tolist()]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _yes(value: Any) -> str:
    return "1" if value else "0"


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


# ---------------------------------------------------------------- reading


def broken(settings: Mapping[str, Any], lines: Iterable[bytes], form: Form = FORM) -> str | None:
    """Where the chain of a ledger's lines, each with its line feed, does not hold; rows are counted with the header."""
    previous, number, ended = _sha256(beginning_of(settings, form)), 0, False
    for number, line in enumerate(lines, start=1):
        if ended:
            return f"row {number}: comes after the last one"
        text, feed = line[:-1], line[-1:]
        if feed != b"\n":
            return f"row {number}: is cut off"
        if number == 1:
            if text != form.header.encode():
                return "row 1: is not the header"
            continue
        content, _, named = text.rpartition(b",")
        if named != previous.encode():
            if number == 2:
                return "row 2: does not follow from run.json's settings (SHA-256 differs)"
            return f"row {number - 1}: is not the row that row {number} was written after (SHA-256 differs)"
        previous, ended = _sha256(text), content == form.end.encode()
    return None if ended else f"row {number}: is not the last one that was written"


def accounts_in(lines: Iterable[str], form: Form = FORM) -> Iterator[Account]:
    """What ledger_lines was given. Raises ValueError or KeyError, and says where, for lines that it never writes."""
    rows = (dict(zip(form.columns, line.rstrip("\n").split(","), strict=True)) for line in lines)
    next(rows)  # the header
    kept = (row for row in rows if row["entry"] != "end")
    for key, of_account in groupby(kept, key=lambda row: [row[name] for name in form.keys]):
        yield _account(key, list(of_account))


def _account(key: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Account:
    audits = {row["entry"]: row for row in rows if row["entry"] != "candidate"}
    ids = audits["alone"]["members"].split(" ")
    place = {user: i for i, user in enumerate(ids)}
    candidates = groupby((row for row in rows if row["entry"] == "candidate"), key=lambda row: row["round"])
    rounds = [_round(number, list(of_round), place) for number, of_round in candidates]
    return Account(
        tuple(map(unquote, key)),
        tuple(map(unquote, ids)),
        tuple(rounds),
        _read(audits["alone"]["reward"], len(ids))[None],
        _read(audits["everybody"]["reward"], 1),
        _read(audits["gained"]["reward"], 1),
    )


def _round(number: str, rows: Sequence[Mapping[str, str]], place: Mapping[str, int]) -> Round:
    """number: of the round. place: of every user's id."""
    users, groups = len(place), [row for row in rows if row["group"] != "0"]
    merged = [row for row in rows if row["group"] == "0"]
    labels, weights = np.full((1, users), NONE), np.zeros((1, users))
    for label, row in enumerate(groups):
        members = [place[user] for user in row["members"].split(" ")]
        if int(row["group"]) != label + 1 or (labels[0, members] != NONE).any():
            raise ValueError(f"round {number}: group {row['group']} is not the next one, or shares members")
        labels[0, members] = label
        weights[0, members] = _read(row["weights"], len(members))
    order = np.argsort([int(row["place"]) for row in rows])
    improved = np.array([row["improved"] == "1" for row in rows])
    taken = np.array([row["taken"] == "1" for row in rows])
    if (labels == NONE).any() or len(merged) > 1 or rows != groups + merged or len(set(improved)) > 1:
        raise ValueError(f"round {number}: does not have every user in one group, or is not of one piece")
    if np.flatnonzero(taken).tolist() != (order[:1].tolist() if improved[0] else []):
        raise ValueError(f"round {number}: what was taken is not what came first")
    return Round(
        labels,
        weights,
        np.array([[float(row["reward"]) for row in groups]]),
        improved[:1],
        order[None],
        _read(merged[0]["weights"], users)[None] if merged else None,
        _read(merged[0]["reward"], 1) if merged else None,
    )


def _read(text: str, count: int) -> np.ndarray:
    """What _written was given, (count,)."""
    numbers = np.array(text.split(" "), dtype=float)
    return np.full(count, numbers[0]) if len(numbers) == 1 else numbers.reshape(count)


# ---------------------------------------------------------------- recomputing


def replayed(account: Account, scoring: Scoring, num_rounds: int) -> Iterator[Standing]:
    """How users stand before the first round and after each, by a scoring that sees the account alone."""
    standing = Standing(np.ones((1, len(account.users))))
    history: list[Round] = []
    yield standing
    for past in account.rounds:
        history.append(past)
        standing = scoring(standing, history, num_rounds)
        yield standing


def paid(account: Account, standing: Standing, num_rounds: int, step: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Whole units of pay (n,) of who stand like this at the end, and their standard errors. step: see
    payout.levelled."""
    here = np.array([past.weights > 0 for past in account.rounds])
    last = payout.last_rounds(num_rounds)
    credit = payout.credits(here.sum(axis=0) / num_rounds, here[-last:].sum(axis=0) / last)
    pay, errors = payout.pay(standing, account.alone, account.everybody, account.gained, credit, step)
    return pay[0], errors[0]


def against_the_rules(past: Round, before: Standing) -> str | None:
    """What of a round (R = 1) does not follow from how users stood before it, if anything; that users were absent, and
    weighed nothing, may be so."""
    groups = past.rewards.shape[1]
    by_points = group_weights(before, past.labels, groups, past.weights != 0)
    nobody_here = group_weights(before, past.labels, groups, np.zeros(past.labels.shape, dtype=bool))
    others = [sums_by_group(1.0 - _close(past.weights, rule), past.labels, groups) for rule in (by_points, nobody_here)]
    if np.minimum(*others).any():  # of each group all members by the same rule
        return "weights are not by the standing before it"
    merged = past.merged_weights
    if (merged is None) != (before.merged_weights is None):
        return "a merged candidate is there without reason, or missing"
    if merged is not None and not _close(merged, merged_weights_of(before, merged != 0)).all():
        return "merged weights are not by the standing before it"
    rewards = past.rewards if past.merged_reward is None else np.append(past.rewards, past.merged_reward[:, None], 1)
    ranked, best = past.order[0].copy(), rewards[0].argmax()
    ranked[past.order[0] == best], ranked[0] = ranked[0], best
    if (np.diff(rewards[0, ranked]) > 0).any() or past.improved[0] != (rewards[0, best] > 0):
        return "places or improved are not by the rewards"
    return None


def _close(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    return np.isclose(a, np.nan if b is None else b, rtol=CLOSE, atol=NOTHING)
