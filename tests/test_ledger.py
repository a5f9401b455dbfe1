"""The ledger: it reads back exactly, points and pay follow from it, and whatever is changed in it is found."""

import hashlib
import json
import shutil
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from experiment.run_folder import output_hashes
from experiment.tables import read_lines, table_path, write_lines
from experiment.verify import main as verify_main
from experiment.verify import verify_run
from user_grouping_evaluation_sim import main as main_module
from user_grouping_evaluation_sim.competition import NONE, Rules, compete
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.ledger import (
    FORM,
    accounts_in,
    against_the_rules,
    beginning_of,
    broken,
    ledger_lines,
    paid,
    replayed,
    rows_of,
)
from user_grouping_evaluation_sim.ledger_check import check_ledger
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import SCORINGS, marginal
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.tables import account_of
from user_grouping_evaluation_sim.vector_world import Conduct, VectorWorld, simulate
from user_grouping_evaluation_sim.verification import half_a_digit, points_may_differ

RUNS, USERS, ROUNDS, DELTA = 3, 9, 30, 0.13
IDS = [f"user {i}, {text}" for i, text in enumerate(["", '"', "é", "a\nb", "*", "%20", " ", "1.0", "-"])]
SETTINGS = dict.fromkeys(FORM.beginning, 1)


def a_crowd():
    rng = np.random.default_rng(3)
    vectors = rng.uniform(0, 5, (RUNS, USERS, 4)), rng.uniform(0, 5, (RUNS, 4)), rng.uniform(0, 5, (RUNS, 4))
    return Crowd(np.tile(np.array(IDS, dtype=object), (RUNS, 1)), *vectors)


def sometimes_here(t):
    """Absent in turns; in every fifth round nobody of the first five users; the last user leaves after round 3."""
    here = (np.arange(USERS) + t) % 4 != 0
    here = here & ~((t % 5 == 0) & (np.arange(USERS) < 5)) & ~((t > 3) & (np.arange(USERS) == USERS - 1))
    return np.tile(here, (RUNS, 1))


def played(scoring, groups, here=None):
    """(the competition's own rounds, what simulate gives, its first run's account) of the same competition."""
    crowd, rules, metric = a_crowd(), Rules(groups, ROUNDS, 0.3), METRICS["l2"]
    functions = GROUPINGS["epsilon_greedy"], SCORINGS[scoring]
    world = VectorWorld(lambda _: crowd.users, crowd.experts, metric, DELTA)
    rng = np.random.default_rng(5)
    steps = list(compete(world, crowd.models, (RUNS, USERS), *functions, rules, rng, here))
    conduct = Conduct(lambda _: crowd.users, here)
    rng = np.random.default_rng(5)
    simulated = simulate(crowd, functions[0], metric, functions[1], rules, rng, DELTA, conduct=conduct)
    combination = SimpleNamespace(
        names=("epsilon_greedy", "l2", scoring), user_ids=crowd.user_ids, trace=simulated.trace
    )
    return steps, simulated, account_of(combination)


@pytest.mark.parametrize("groups, here", [(3, None), (3, sometimes_here), (1, None), (1, sometimes_here)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_competitions_standings_and_pay_follow_from_the_rows(scoring, groups, here):
    steps, simulated, account = played(scoring, groups, here)
    read = list(accounts_in(ledger_lines(SETTINGS, [account])))
    assert len(read) == 1
    assert (read[0].names, read[0].users) == (("epsilon_greedy", "l2", scoring, "0"), tuple(IDS))
    before, *after = replayed(read[0], SCORINGS[scoring], ROUNDS)
    for step, past, standing_before, standing in zip(steps, read[0].rounds, [before, *after], after, strict=False):
        for name, numbers in vars(step.round).items():
            if numbers is None:
                assert getattr(past, name) is None
            else:
                np.testing.assert_array_equal(getattr(past, name), numbers[:1], err_msg=name)
        np.testing.assert_allclose(standing.points, step.standing.points[:1], rtol=1e-9, atol=1e-9)
        assert against_the_rules(past, standing_before) is None
    assert len(read[0].rounds) == ROUNDS
    np.testing.assert_allclose(after[-1].points, simulated.points[:1], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(paid(read[0], after[-1], ROUNDS, DELTA)[0], simulated.pay[0])
    assert simulated.pay[0].sum() == simulated.budget[0] > 0


def test_the_cases_above_hold_what_they_are_to_hold():
    steps, _, account = played("marginal_merged", 3, sometimes_here)
    kinds = dict.fromkeys(("merged", "mistaken", "merged taken", "nothing taken", "absent", "nobody here"), 0)
    for step in steps:
        past, here = step.round, step.round.weights[0] > 0
        kinds["merged"] += past.merged_weights is not None
        kinds["merged taken"] += step.taken[0] == 3
        kinds["nothing taken"] += step.taken[0] == NONE
        rewards = [*past.rewards[0], *([] if past.merged_reward is None else past.merged_reward[:1])]
        kinds["mistaken"] += past.order[0, 0] != np.argmax(rewards)
        kinds["absent"] += not here.all()
    for number, step in enumerate(steps):
        members = [step.round.labels[0] == group for group in range(3)]
        kinds["nobody here"] += any(not sometimes_here(number)[0, own].any() for own in members)
    assert min(kinds.values()) > 0, kinds
    assert {row[FORM.columns.index("group")] for row in rows_of(account)} == {"0", "1", "2", "3", ""}


BY_HAND = [
    # two groups of two; group 2 comes first by an error, group 1 has the greater reward
    "g,l2,marginal,0,candidate,1,1,a d,0.5,0.25,2,0,1",
    "g,l2,marginal,0,candidate,1,2,b c,0.5,-0.125,1,1,1",
    # nothing improves: nobody earns; d weighs its points squared, 1.25^2 against 0.875^2
    "g,l2,marginal,0,candidate,2,1,d c,0.6711409395973155 0.3288590604026846,-0.5,2,0,0",
    "g,l2,marginal,0,candidate,2,2,a b,0.6711409395973155 0.3288590604026846,-0.25,1,0,0",
    "g,l2,marginal,0,alone,,,a b c d,,1.0,,,",
    "g,l2,marginal,0,everybody,,,*,,2.0,,,",
    "g,l2,marginal,0,gained,,,,,1.7e-05,,,",
]


def by_hand():
    previous, lines = hashlib.sha256(beginning_of(SETTINGS)).hexdigest(), [",".join(FORM.columns)]
    for text in [*BY_HAND, FORM.end]:
        lines.append(f"{text},{previous}")
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    return lines


def test_a_ledger_by_hand():
    lines = by_hand()
    assert broken(SETTINGS, (f"{line}\n".encode() for line in lines)) is None
    (account,) = accounts_in(lines)
    before, first, second = replayed(account, marginal, 2)
    np.testing.assert_array_equal(first.points, [[1.25, 0.875, 0.875, 1.25]])
    np.testing.assert_array_equal(second.points, first.points)
    assert against_the_rules(account.rounds[0], before) is against_the_rules(account.rounds[1], first) is None
    # 17 units by 1.25 : 0.875 are 5 each and 3.5 each; of the equal remainders the first gets the last one
    np.testing.assert_array_equal(paid(account, second, 2, 0.1)[0], [5, 4, 3, 5])
    again = list(ledger_lines(SETTINGS, [account]))
    assert broken(SETTINGS, (f"{line}\n".encode() for line in again)) is None
    assert next(accounts_in(again)).users == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "row, old, new, told",
    [
        (0, "0.5,0.25", "0.75 0.25,0.25", "weights are not"),
        (2, "0.6711409395973155 0.3288590604026846", "0.5", None),  # as if nobody of them had been here
        (2, "0.6711409395973155 0.3288590604026846", "1.0 0.0", None),  # as if c had not been here
        (2, "0.6711409395973155 0.3288590604026846", "0.7 0.3", "weights are not"),
        (
            2,
            "0.6711409395973155 0.3288590604026846",
            "0.6711409395973155 0.5",
            "weights are not",
        ),  # each by another rule
        (3, "-0.25,1", "-0.75,1", None),  # an error again
        (3, "-0.25,1,0,0", "0.25,1,0,0", "places or improved"),
    ],
)
def test_what_is_against_the_rules_is_told(row, old, new, told):
    lines = by_hand()
    assert old in lines[row + 1]
    lines[row + 1] = lines[row + 1].replace(old, new)
    (account,) = accounts_in(lines)
    number = row // 2
    before = list(replayed(account, marginal, 2))[number]
    answer = against_the_rules(account.rounds[number], before)
    assert answer is None if told is None else answer.startswith(told)


@pytest.mark.parametrize(
    "row, old, new",
    [
        (0, "a d,", "a b,"),  # d in no group, b in two
        (0, "a d,", "a,"),
        (0, "a d,", "a e,"),
        (1, ",1,2,", ",1,3,"),
        (1, ",1,1,1,", ",1,0,1,"),  # nothing taken
        (0, ",2,0,1,", ",2,1,1,"),  # two taken
        (3, ",1,0,0,", ",1,0,1,"),
        (0, "0.25", "a quarter"),
        (4, "1.0,", "1.0 2.0,"),
        (4, "alone", "only"),
        (0, ",2,0,1,", ",2,0,1,,"),
    ],
)
def test_rows_that_are_never_written_are_refused(row, old, new):
    lines = by_hand()
    assert old in lines[row + 1]
    lines[row + 1] = lines[row + 1].replace(old, new, 1)
    with pytest.raises((ValueError, KeyError)):
        list(accounts_in(lines))


# ------------------------------------------------------------------ of a run

OWN = """
from dataclasses import replace

def by_size(standing, history, num_rounds):
    last = history[-1]
    return replace(standing, points=standing.points + last.weights)
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of four combinations, one of them with a scoring of the user's own, named from its folder."""
    home = tmp_path_factory.mktemp("ledger")
    vectors = np.random.default_rng(0).uniform(0, 5, (30, 4)).round(3)
    matrix = pd.DataFrame(vectors, columns=list("abcd"), index=pd.Index([f"user {i}" for i in range(30)], name="who"))
    matrix.to_csv(home / "matrix.csv")
    (home / "own_ledger_scoring.py").write_text(OWN, encoding="utf-8")
    settings = {"output_dir": home / "run", "jobs": 1, "preferences": home / "matrix.csv", "evaluation_noise": 0.02}
    settings |= {"num_users": 8, "num_groups": 2, "num_rounds": 12, "num_runs": 4, "kernel_runs": 0, "metric": ("l2",)}
    settings |= {"grouping": ("random",), "scoring": ("marginal", "ranked", "attributed", "own_ledger_scoring:by_size")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(main_module, "figures_of", lambda *_: [])
        patch.syspath_prepend(str(home))
        main_module.main(Settings(**settings))
        yield home / "run"


@pytest.fixture
def copy(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def checked(folder):
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    points = pd.read_csv(folder / "points.csv", dtype={"user": str})
    expected = [("random", "l2", scoring, "0") for scoring in record["scoring"]]
    return check_ledger(folder, FORM, expected, points, record, record["delta"], tolerance=points_may_differ)


def hide(folder):
    """As one would who changes run.json's hashes too."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(record | {"outputs_sha256": output_hashes(folder)}))


def test_a_good_run_agrees(run_folder, capsys):
    names = "random, l2, own_ledger_scoring:by_size, run 0"
    differences, unchecked = verify_run(run_folder)
    assert differences == []
    own = f"points and pay of {names}: --own-code runs own_ledger_scoring:by_size to recompute them"
    assert unchecked == ["the code of own_ledger_scoring:by_size", own]
    assert verify_run(run_folder, own_code=True) == ([], ["the code of own_ledger_scoring:by_size"])
    assert verify_main(["--own-code", str(run_folder)]) == 0
    assert "all agrees" in capsys.readouterr().out


def test_a_ledger_holds_every_round_and_candidate(run_folder):
    frame = pd.read_csv(run_folder / "ledger.csv", keep_default_na=False, dtype=str)
    assert tuple(frame.columns) == FORM.columns
    groups = frame[(frame["entry"] == "candidate") & (frame["group"] != "0")]
    assert (groups.groupby(["grouping", "metric", "scoring", "run"]).size() == 12 * 2).all()
    assert set(frame.loc[frame["group"] == "0", "scoring"]) == {"attributed"}
    assert frame["entry"].iloc[-1] == "end" and (frame["entry"] == "end").sum() == 1
    lines = (run_folder / "ledger.csv").read_bytes().splitlines()
    for line, following in zip(lines[1:-1], frame["previous"].iloc[1:], strict=True):
        assert hashlib.sha256(line).hexdigest() == following


def test_every_changed_byte_of_a_ledger_is_found(copy):
    path, rng = copy / "ledger.csv", np.random.default_rng(0)
    held = path.read_bytes()
    last_row = held[:-1].rindex(b"\n") + 1
    places = [*rng.integers(len(held), size=100), *range(last_row, len(held)), *range(len(",".join(FORM.columns)) + 1)]
    for place in places:
        changed = bytearray(held)
        changed[place] = (changed[place] + rng.integers(1, 256)) % 256
        path.write_bytes(changed)
        differences, _ = checked(copy)
        assert len(differences) == 1 and differences[0].startswith("ledger.csv: row "), (place, differences)
    path.write_bytes(held)
    assert checked(copy)[0] == []


def test_moved_missing_and_added_rows_are_found(copy):
    path, rng = copy / "ledger.csv", np.random.default_rng(1)
    held = path.read_bytes().splitlines(keepends=True)
    last = len(held) - 1
    for row in [0, 1, last - 1, last, *rng.integers(len(held), size=20)]:
        other = (row + rng.integers(1, len(held))) % len(held)
        swapped = list(held)
        swapped[row], swapped[other] = held[other], held[row]
        forged = {
            "deleted": held[:row] + held[row + 1 :],
            "duplicated": held[: row + 1] + held[row:],
            "swapped": swapped,
            "cut": held[:row],
            "appended": [*held, held[row]],
            "empty": [*held[:row], b"\n", *held[row:]],
        }
        for what, lines in forged.items():
            path.write_bytes(b"".join(lines))
            differences, _ = checked(copy)
            assert len(differences) == 1 and differences[0].startswith("ledger.csv: "), (what, row, differences)
    path.write_bytes(b"".join(held)[:-1])
    assert checked(copy)[0] == [f"ledger.csv: row {len(held)}: is cut off"]


def test_every_changed_digit_of_points_and_pay_is_found(copy):
    path, rng = copy / "points.csv", np.random.default_rng(2)
    held = pd.read_csv(path, dtype=str, keep_default_na=False)
    known = held.index[(held["run"] == "0") & ~held["scoring"].str.contains(":")]
    for _ in range(100):
        frame, row, column = held.copy(), rng.choice(known), rng.choice(["points", "pay"])
        text = held.loc[row, column]
        place = rng.choice([i for i, letter in enumerate(text) if letter.isdigit()])
        digit = (int(text[place]) + rng.integers(1, 10)) % 10
        frame.loc[row, column] = f"{text[:place]}{digit}{text[place + 1 :]}"
        frame.to_csv(path, index=False, lineterminator="\n")
        differences, _ = checked(copy)
        names = ", ".join(held.loc[row, ["grouping", "metric", "scoring"]])
        who = f"points.csv: row {row + 2}: {names}, run 0, {held.loc[row, 'user']}: {column} "
        assert len(differences) == 1 and differences[0].startswith(who), differences
        told, by_ledger = differences[0].removeprefix(who).removesuffix(" by ledger.csv").split(" is ")
        assert float(told) == float(frame.loc[row, column])
        assert float(by_ledger) == pytest.approx(float(text), rel=1e-5)


def test_a_last_digit_that_is_off_by_one_is_beyond_rounding():
    values = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-10, 10).repeat(100)
    written = [Decimal(f"{value:.6g}") for value in values]
    units = [Decimal(10) ** (text.adjusted() - 5) for text in written]
    allowed = half_a_digit(values)
    assert (np.abs(np.array(written, dtype=float) - values) <= allowed).all()
    for sign in (-1, 1):
        off = [text + sign * unit for text, unit in zip(written, units, strict=True)]
        assert (np.abs(np.array(off, dtype=float) - values) > allowed).mean() > 0.998  # but for those half-way between


def rechained(folder, change):
    """A ledger that was forged from one end to the other: only what it says can give it away."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    accounts = list(accounts_in(line.decode() for line in read_lines(folder, "ledger")))
    write_lines(ledger_lines(record, [change(account) for account in accounts]), folder, "ledger", large=False)
    hide(folder)


def test_a_forged_chain_is_given_away_by_what_follows_from_it(copy):
    def doubled(account):
        account.rounds[0].rewards[:] *= 2
        return account

    rechained(copy, doubled)
    told, _ = verify_run(copy)
    assert any(line.startswith("points.csv: row 2: random, l2, marginal, run 0, user ") for line in told), told
    assert not any("own_ledger_scoring" in line for line in told)


def test_a_forged_weight_is_given_away_by_the_rules(copy):
    def favoured(account):
        weights = account.rounds[-1].weights
        weights[0, 0] = 0.9
        return account

    rechained(copy, favoured)
    assert any(": round 12: weights are not by the standing before it" in line for line in verify_run(copy)[0])


def test_another_crowd_or_fewer_rounds_are_told(copy):
    def renamed(account):
        return type(account)(**vars(account) | {"users": ("somebody", *account.users[1:])})

    def shortened(account):
        return type(account)(**vars(account) | {"rounds": account.rounds[:-1]})

    held = (copy / "ledger.csv").read_bytes()
    rechained(copy, renamed)
    assert any(
        line.startswith("ledger.csv: its run or users are not those of random, l2") for line in verify_run(copy)[0]
    )
    (copy / "ledger.csv").write_bytes(held)
    rechained(copy, shortened)
    assert "ledger.csv: random, l2, ranked, run 0: 11 rounds of 12" in verify_run(copy)[0]


def test_other_settings_are_told(copy):
    record = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    (copy / "run.json").write_text(json.dumps(record | {"delta": 0.2}))
    assert "ledger.csv: row 2: does not follow from run.json's settings (SHA-256 differs)" in verify_run(copy)[0]


def test_own_code_that_is_not_the_runs_is_told(copy, run_folder):
    path = run_folder.parent / "own_ledger_scoring.py"
    held = path.read_text(encoding="utf-8")
    path.write_text(held + "# another\n", encoding="utf-8")
    try:
        told, _ = verify_run(copy, own_code=True)
    finally:
        path.write_text(held, encoding="utf-8")
    assert told == ["own_ledger_scoring:by_size: is not the code of this run (SHA-256 differs)"]


def test_a_packed_ledger_is_read_and_damage_is_told(copy):
    lines = [line.decode()[:-1] for line in read_lines(copy, "ledger")]
    (copy / "ledger.csv").unlink()
    assert checked(copy) == ([], ["ledger.csv: the run wrote none"])
    write_lines(lines, copy, "ledger", large=True)
    assert table_path(copy, "ledger").name == "ledger.csv.gz"
    assert checked(copy)[0] == []
    packed = (copy / "ledger.csv.gz").read_bytes()
    write_lines(lines, copy, "ledger", large=True)
    assert (copy / "ledger.csv.gz").read_bytes() == packed
    for damaged in (packed[: len(packed) // 2], b"no gzip", packed[:200] + bytes(50) + packed[250:]):
        (copy / "ledger.csv.gz").write_bytes(damaged)
        differences, _ = checked(copy)
        assert len(differences) == 1 and differences[0].startswith("ledger.csv: ")


def test_a_ledger_that_would_be_too_long_is_not_written(monkeypatch, capsys, tmp_path):
    _, _, account = played("marginal", 3)
    numbers = 2 * USERS * ROUNDS * 2  # members and weights of two accounts
    run = SimpleNamespace(path=tmp_path, identity=SETTINGS)
    monkeypatch.setattr(main_module, "MOST_NUMBERS", numbers - 1)
    main_module.write_ledger(run, [account, account])
    assert list(tmp_path.iterdir()) == []
    assert f"no ledger: it would hold {numbers:,} members and weights" in capsys.readouterr().out
    monkeypatch.setattr(main_module, "MOST_NUMBERS", numbers)
    main_module.write_ledger(run, [account, account])
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.csv"]
