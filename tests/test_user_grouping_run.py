"""The command line of the user grouping experiment, end to end: its files, its resumption, what it refuses."""

import gzip
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiment.command_line import run_script
from experiment.errors import InputError
from experiment.parallel import parallel_map
from user_grouping_evaluation_sim import sweep
from user_grouping_evaluation_sim.incentives import STRATEGIES
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import read_matrix, read_movielens
from user_grouping_evaluation_sim.settings import DATA, PRESETS, Settings
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.sweep import crowd_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "user_grouping_evaluation_sim" / "run.py"
COMBINATION = ["grouping", "metric", "scoring"]
COLUMNS = {  # the contract of design.md
    "runs": [
        *COMBINATION,
        "run",
        "start_distance",
        "final_distance",
        "hull_distance",
        "rounds_to_converge",
        "pearson",
        "spearman",
        "shapley_standard_error",
        "budget",
        "budget_ratio",
        "misallocation",
        "unpaid",
        "gini",
    ],
    "rounds": [*COMBINATION, "run", "round", "distance"],
    "points": [*COMBINATION, "run", "user", "points", "points_error", "pay", "pay_error", "shapley", "standard_error"],
}
MEASURES = [
    "start_distance",
    "final_distance",
    "hull_distance",
    "regret",
    "rounds_to_converge",
    "pearson",
    "spearman",
    "budget_ratio",
    "misallocation",
    "unpaid",
    "gini",
]
COLUMNS["audit"] = "strategy users grouping metric scoring pay_vs_twin low high shapley_vs_twin regret pearson".split()
ABLATED = (m + end for m in ("pearson", "regret", "misallocation") for end in ("", "_low", "_high"))
COLUMNS["ablation"] = ["pay", "steering", *COMBINATION[:2], "scoring", "runs", *ABLATED]
COLUMNS["summary"] = [*COMBINATION, "runs", *(m + end for m in MEASURES for end in ("", "_low", "_high"))]
TINY = ["--num-users", "6", "--num-groups", "2", "--num-rounds", "5", "--num-runs", "3", "--kernel-runs", "1"]
DEFAULT = [*TINY, "--grouping", "random", "interleaved", "--metric", "l2", "dot"]  # fewer panels: they take seconds
OWN = '''
"""A user's own strategies, as short as they get."""
from dataclasses import replace

import numpy as np


def by_turns(points, num_groups, progress, rng):
    return np.broadcast_to(np.arange(points.shape[1]) % num_groups, points.shape)


def worst(a, b):
    return -np.abs(a - b).max(axis=-1)


def attendance(standing, history, num_rounds):
    return replace(standing, points=standing.points + 1)


def one_group(points, num_groups, progress, rng):
    return np.zeros(points.shape, dtype=int)


def one_draw(points, num_groups, progress, rng):
    return np.broadcast_to(rng.permutation(points.shape[1]) % num_groups, points.shape)


def overlapping(points, num_groups, progress, rng):
    members = np.arange(points.shape[1])
    return [[members[:4], members[2:]] for _ in points]


def hellinger(a, b):
    with np.errstate(invalid="ignore"):
        return -np.linalg.norm(np.sqrt(a) - np.sqrt(b), axis=-1)


def cosine(a, b):
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
'''


def run(folder, *options, cwd=ROOT, python=(), check=True, **more):
    command = [sys.executable, *python, str(SCRIPT), "--output-dir", str(folder), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **more)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def main_here(here, *options):
    """The script's own main in this process, in the folder `here`; without figures, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "argv", ["run.py", "--no-figures", *map(str, options)])
        patch.setattr(sys, "path", [*sys.path])  # named_function adds the current folder
        return run_script("user_grouping_evaluation_sim.main", Settings, PRESETS, None)


def tables(folder):
    return {path.stem: pd.read_csv(path, dtype={"user": str}) for path in folder.glob("*.csv")}


def csv_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


def everything_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with a matrix and strategies of their own."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    matrix = pd.DataFrame(rng.uniform(0, 5, (40, 5)).round(2), columns=list("abcde"))
    matrix.insert(0, "who", [f"user {i}" for i in range(40)])
    matrix.to_csv(folder / "matrix.csv", index=False)
    (folder / "own_strategies.py").write_text(OWN, encoding="utf-8")
    return folder


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "run"
    done = run(folder, *DEFAULT, "--jobs", "1", cwd=folder.parent, python=["-X", "importtime"])
    (folder.parent / "imported.txt").write_text(done.stderr)
    return folder


def test_default_files(default_run):
    found = tables(default_run)
    for name, columns in COLUMNS.items():
        assert list(found[name].columns) == columns, name
        assert b"\r" not in (default_run / f"{name}.csv").read_bytes()
    combinations = 2 * 2 * 3
    lengths = {"runs": 3, "rounds": 3 * 6, "points": 3 * 6, "summary": 1}
    assert {name: len(found[name]) for name in lengths} == {k: combinations * v for k, v in lengths.items()}
    assert not found["points"].drop(columns=["points_error", "pay_error"]).isna().any(axis=None)
    for column in ("points_error", "pay_error"):
        known = found["points"].groupby("scoring")[column].agg(lambda errors: errors.notna().all())
        assert known.to_dict() == {"marginal": False, "ranked": False, "attributed": True}
    paid = found["points"].groupby([*COMBINATION, "run"], sort=False)["pay"].sum()
    np.testing.assert_array_equal(paid, found["runs"]["budget"])
    names = {path.stem for path in default_run.glob("*.png")}
    assert names == {path.stem for path in default_run.glob("*.pdf")}
    assert {
        "distance_by_grouping_ranked",
        "distance_by_metric_ranked",
        "points_against_shapley_marginal",
        "points_against_shapley_ranked",
        "points_against_shapley_attributed",
        "correlation_against_distance",
        "subset_influence",
        "estimator_noise",
    } <= names
    for name in names:
        assert (default_run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (default_run / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not [path.name for path in default_run.iterdir() if path.name.startswith(".")]


def test_tables_agree_with_each_other(default_run):
    found = tables(default_run)
    rounds, points = (dict(list(found[name].groupby([*COMBINATION, "run"]))) for name in ("rounds", "points"))
    for row in found["runs"].to_dict("records"):
        key = (*(row[name] for name in COMBINATION), row["run"])
        distances, of_users = rounds[key]["distance"], points[key]
        assert rounds[key]["round"].tolist() == list(range(6))
        assert (distances.iloc[0], distances.iloc[-1]) == (row["start_distance"], row["final_distance"])
        assert row["final_distance"] >= row["hull_distance"] - 1e-6
        r = stats.pearsonr(of_users["points"], of_users["shapley"]).statistic
        assert row["pearson"] == pytest.approx(r, abs=1e-3)
    for row in found["summary"].to_dict("records"):
        chosen = found["runs"]
        for name in COMBINATION:
            chosen = chosen[chosen[name] == row[name]]
        final = chosen["final_distance"]
        low, high = stats.t.interval(0.95, 2, loc=final.mean(), scale=stats.sem(final))
        got = [row["final_distance"], row["final_distance_low"], row["final_distance_high"]]
        assert got == pytest.approx([final.mean(), low, high], rel=1e-4, abs=1e-4)


def test_combinations_of_a_run_start_alike(default_run):
    found = tables(default_run)
    assert (found["runs"].groupby("run")[["start_distance", "hull_distance"]].nunique() == 1).all(axis=None)
    assert found["runs"]["start_distance"].nunique() == 3
    assert (found["points"].groupby(["run", "user"]).size() == 12).all()
    assert (found["points"].groupby(["metric", "run", "user"])["shapley"].nunique() == 1).all()


def test_shapley_values_are_of_the_crowd(default_run):
    """The values in points.csv against the estimator at the crowd that the seed gives, by metric."""
    settings = Settings(num_users=6, num_groups=2)
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz")
    crowd = crowd_of(settings, preferences, 6, 0, 3)
    points = tables(default_run)["points"]
    for name in ("l2", "dot"):
        chosen = points[(points["metric"] == name) & (points["grouping"] == "random")]
        chosen = chosen[chosen["scoring"] == "marginal"]
        for number in range(3):
            of_run = chosen[chosen["run"] == number]
            assert of_run["user"].tolist() == crowd.user_ids[number].tolist()
            values = shapley_values(crowd.users[number], crowd.experts[number], METRICS[name], method="exact").values
            np.testing.assert_allclose(of_run["shapley"], values, rtol=1e-4, atol=1e-4)


def test_run_json_says_where_the_run_came_from(default_run):
    record = json.loads((default_run / "run.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["num_users"], record["delta"]) == (0, 6, 0.1)
    assert set(record["data_sha256"]) == {"ratings", "movies"}
    assert record["packages"]["numpy"] == np.__version__
    assert record["seconds"]["figures"] > 0
    assert len(record["dimensions"]) == 19
    assert {"git_commit", "python", "machine", "command"} <= set(record)


def test_a_finished_run_is_not_run_again(default_run, command_line):
    before = everything_in(default_run)
    code, printed, _ = command_line("--output-dir", default_run, *DEFAULT, "--jobs", "1")
    assert code == 0
    assert "already complete" in printed
    assert everything_in(default_run) == before


def test_paper_preset_is_the_study(tmp_path):
    folder = tmp_path / "run"
    options = ["--preset", "paper", *TINY, "--jobs", "1", "--grouping", "interleaved", "--metric", "l2"]
    assert main_here(tmp_path, *options, "--output-dir", folder) == 0
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert len(record["dimensions"]) == 20
    assert "(no genres listed)" in record["dimensions"]
    assert record["scoring"] == ["ranked"]
    with gzip.open(DATA / "ratings.csv.gz", "rt", encoding="utf-8") as file:
        ids = list(map(str, sorted({int(line.split(",")[0]) for line in file if line[0].isdigit()})))
    points = tables(folder)["points"]
    crowds = points.groupby("run")["user"].agg(set)
    for crowd in crowds:
        assert len(set(ids[:7]) - crowd) == 1  # one of the first 7 is the expert
        assert crowd < set(ids[:7])


def test_heavy_libraries_stay_out(default_run):
    imported = set(re.findall(r"\|\s+(\w+)$", (default_run.parent / "imported.txt").read_text(), re.M))
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "peft"}


def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # of processor time: CI is shared
    for option in ("--num-users", "--num-groups", "--grouping", "--preset", "--sweep", "--preferences", "--scheduler"):
        assert option in done.stdout
    imported = set(re.findall(r"\|\s+(\w+)$", done.stderr, re.M))
    assert not imported & {"torch", "transformers", "pandas", "matplotlib", "shap"}


def test_quick_preset_as_a_module(tmp_path):
    command = [
        sys.executable,
        "-m",
        "user_grouping_evaluation_sim.run",
        "--preset=quick",
        "--output-dir",
        tmp_path / "q",
    ]
    command += ["--metric", "dot", "--scoring", "attributed", "--grouping", "random", "--kernel-runs", "0"]
    command += ["--no-figures"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    found = tables(tmp_path / "q")
    assert len(found["rounds"]) == 6 * 21
    assert found["points"].groupby("run").size().tolist() == [20] * 6
    assert (found["points"]["standard_error"] == 0).all()


def test_audit_and_absence(home, tmp_path):
    options = [*TINY, "--preferences", "matrix.csv", "--jobs", 1, "--scoring", "ranked", "attributed"]
    assert main_here(home, *options, "--metric", "l2", "l1", "--audit", "--output-dir", tmp_path / "a") == 0
    audit = tables(tmp_path / "a")["audit"]
    assert len(audit) == len(STRATEGIES) * 3 * 2 * 2  # groupings, metrics, scorings
    honest = audit[audit["strategy"] == "honest"]
    assert (honest[["pay_vs_twin", "low", "high", "shapley_vs_twin"]] == 1).all(axis=None)
    ablation = tables(tmp_path / "a")["ablation"]
    assert ablation["pay"].tolist() == [*["marginal", "ranked", "attributed"] * 2, "convex"]
    assert sorted(ablation["steering"]) == ["merged"] * 4 + ["squared"] * 3
    same = ablation.merge(honest, on=COMBINATION)  # those that were asked for: played once, shown twice
    assert set(same["scoring"]) == {"ranked", "attributed"} and (same["regret_x"] == same["regret_y"]).all()
    assert ablation["misallocation"].between(0, 1).all()
    gone = audit[audit["strategy"] == "leave after round 1"]
    assert gone["shapley_vs_twin"].isna().all()
    more = [*options, "--metric", "l2", "--output-dir"]
    assert main_here(home, *more, tmp_path / "here", "--absent", 0) == 0
    assert main_here(home, *more, tmp_path / "away", "--absent", 0.5) == 0
    here, away = (tables(tmp_path / name) for name in ("here", "away"))
    assert not (here["points"]["points"] == away["points"]["points"]).all()
    first = [
        frames["audit"].query("grouping == 'random'") for frames in (here, {"audit": audit.query("metric == 'l2'")})
    ]
    pd.testing.assert_frame_equal(
        *(frame.reset_index(drop=True) for frame in first)
    )  # what else is audited moves nothing


def test_noise_moves_values_and_no_one_elses_crowd(home, tmp_path):
    options = [*TINY, "--preferences", "matrix.csv", "--jobs", 1, "--metric", "l2", "--output-dir"]
    assert main_here(home, *options, tmp_path / "none") == 0
    assert main_here(home, *options, tmp_path / "some", "--evaluation-noise", 0.5) == 0
    none, some = (tables(tmp_path / name) for name in ("none", "some"))
    for column in ("user", "shapley"):
        assert (none["points"][column] == some["points"][column]).all()
    assert (none["runs"]["start_distance"] == some["runs"]["start_distance"]).all()
    assert not (none["runs"]["final_distance"] == some["runs"]["final_distance"]).all()


def test_the_studys_estimator_alone(home, tmp_path):
    """--shapley kernel validates every run by it; there is nothing to compare it with."""
    options = ["--preferences", "matrix.csv", "--shapley", "kernel", "--metric", "l2", "--grouping", "random"]
    assert main_here(home, *TINY, *options, "--output-dir", tmp_path / "k", "--jobs", 1) == 0
    found = tables(tmp_path / "k")
    crowd = crowd_of(Settings(num_users=6), read_matrix(home / "matrix.csv"), 6, 0, 3)
    exact = [
        shapley_values(*pair, METRICS["l2"], method="exact").values
        for pair in zip(crowd.users, crowd.experts, strict=True)
    ]
    got = found["points"].query("scoring == 'ranked'")["shapley"].to_numpy().reshape(3, 6)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)  # with 6 users it enumerates all coalitions
    assert "estimators" not in found


def test_the_protocol_games_values(home, tmp_path):
    """--reference protocol: points, correlations and report are of each combination's own game, by enumeration."""
    options = ["--preferences", "matrix.csv", "--reference", "protocol", "--metric", "l2", "--num-users", 4]
    options += ["--grouping", "random", "own_strategies:by_turns", "--scoring", "marginal", "attributed"]
    tiny = ["--num-groups", 2, "--num-rounds", 5, "--num-runs", 2, "--jobs", 1]
    assert main_here(home, *options, *tiny, "--output-dir", tmp_path / "p") == 0
    found = tables(tmp_path / "p")
    assert "estimators" not in found
    settings = Settings(num_users=4, num_groups=2, num_rounds=5, num_runs=2, reference="protocol")
    preferences = read_matrix(home / "matrix.csv")
    coalitions = np.array(list(itertools.product([False, True], repeat=4)))
    size = coalitions.sum(axis=1)
    values = []
    for scoring, run in itertools.product(("marginal", "attributed"), range(2)):
        task = sweep.ProtocolValidation(4, 2, "random", "l2", scoring, run)
        game = sweep.protocol_game(settings, crowd_of(settings, preferences, 4, run, 1), task)
        weights = 1 / (4 * np.array([math.comb(3, k) for k in range(4)]))
        signs = np.where(coalitions, weights[size[:, None] - 1], -weights[np.minimum(size, 3)[:, None]])
        values.append(game(coalitions) @ signs)
        of_run = found["points"].query(f"grouping == 'random' and scoring == '{scoring}' and run == {run}")
        np.testing.assert_allclose(of_run["shapley"], values[-1], rtol=1e-4, atol=1e-5)
        assert (of_run["standard_error"] > 0).all()
        row = found["runs"].query(f"grouping == 'random' and scoring == '{scoring}' and run == {run}").iloc[0]
        r = stats.pearsonr(of_run["points"], values[-1]).statistic
        assert row["pearson"] == pytest.approx(r, abs=1e-3)
    assert len({tuple(row) for row in np.round(values, 9)}) == 4
    record = json.loads((tmp_path / "p" / "run.json").read_text(encoding="utf-8"))
    assert record["reference"] == "protocol"
    page = (tmp_path / "p" / "report.html").read_text(encoding="utf-8")
    assert "Shapley values of the protocol game" in page
    assert "static game" not in page


def test_own_strategies_matrix_and_sweep(home, tmp_path):
    options = ["--grouping", "own_strategies:by_turns", "--metric", "own_strategies:worst"]
    options += ["--scoring", "own_strategies:attendance", "--preferences", "matrix.csv", "--jobs", "2"]
    options += ["--sweep", "--sweep-users", "4", "7", "--sweep-groups", "1", "3"]
    run(tmp_path / "s", *TINY, *options, cwd=home)
    found = tables(tmp_path / "s")
    assert list(found["sweep"].columns) == [*COLUMNS["summary"], "num_users", "num_groups"]
    assert found["sweep"][["num_users", "num_groups"]].to_numpy().tolist() == [[4, 1], [4, 3], [7, 1], [7, 3]]
    assert (found["sweep"]["grouping"] == "own_strategies:by_turns").all()
    assert (found["points"]["points"] == 1 + 5).all()  # one a round, from 1
    assert set(found["points"]["user"]) <= {f"user {i}" for i in range(40)}
    assert (found["best"]["best_share"] == 1).all()  # of one combination
    crowd = crowd_of(Settings(num_users=6), read_matrix(home / "matrix.csv"), 6, 0, 1)
    worst = shapley_values(
        crowd.users[0], crowd.experts[0], lambda a, b: -np.abs(a - b).max(axis=-1), method="exact"
    ).values
    np.testing.assert_allclose(found["points"].query("run == 0")["shapley"], worst, rtol=1e-4)
    assert list((tmp_path / "s").glob("sweep_final_distance_*.png"))
    record = json.loads((tmp_path / "s" / "run.json").read_text(encoding="utf-8"))
    assert set(record["code_sha256"]) == {option for option in options if option.startswith("own_strategies:")}
    assert list(record["data_sha256"]) == ["preferences"]


# ------------------------------------------------------------------ the same bytes, however it is run

MIDDLING = ["--num-users", "20", "--num-rounds", "30", "--num-runs", "20", "--kernel-runs", "4", "--metric", "l1"]
MIDDLING += ["--grouping", "random", "epsilon_greedy", "--preferences", "matrix.csv", "--seed", "7"]


@pytest.fixture(scope="module")
def reference_run(home):
    folder = home / "reference"
    assert main_here(home, *MIDDLING, "--output-dir", folder, "--jobs", 1) == 0
    return folder


def test_killed_run_goes_on_to_the_same_bytes(reference_run, home, tmp_path, command_line):
    folder = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), "--output-dir", str(folder), *MIDDLING, "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob(".parts/[!.]*.npz"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
            assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = list(folder.glob(".parts/[!.]*.npz"))
    assert len(finished) >= 2
    assert not list(folder.glob("*.csv"))
    assert not (folder / "run.json").exists()
    code, _, errors = command_line(*MIDDLING, "--output-dir", folder, "--no-resume")
    assert code == 2
    assert "holds an unfinished run" in errors
    before = {path.name: path.stat().st_mtime_ns for path in finished}
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob(".parts/[!.]*.npz")} == before
    assert command_line(*MIDDLING, "--output-dir", folder, "--jobs", 2)[0] == 0
    assert csv_bytes(folder) == csv_bytes(reference_run)
    assert set(everything_in(folder)) == set(everything_in(reference_run))


def test_a_ray_cluster_gives_the_same_bytes(reference_run, tmp_path, ray_address, command_line):
    def where(task):
        return task, os.getpid()

    def refuses(task):
        raise InputError("task 3: one line")

    seen = list(parallel_map(where, range(8), jobs=2, backend="ray", scheduler=ray_address))
    assert [task for task, _ in seen] == list(range(8)) and os.getpid() not in {process for _, process in seen}
    assert list(parallel_map(where, [], jobs=2, backend="ray", scheduler=ray_address)) == []
    with pytest.raises(InputError, match=r"^task 3: one line$"):
        list(parallel_map(refuses, [1, 2], jobs=2, backend="ray", scheduler=ray_address))
    options = [*MIDDLING, "--output-dir", tmp_path / "run", "--backend", "ray", "--scheduler", ray_address]
    assert command_line(*options)[0] == 0
    assert csv_bytes(tmp_path / "run") == csv_bytes(reference_run)


def test_a_cluster_gives_the_same_bytes(reference_run, tmp_path, cluster, command_line):
    address, workers = cluster

    def where(task):
        time.sleep(0.02)
        return task, os.getpid()

    seen = list(parallel_map(where, range(12), backend="dask", scheduler=address))
    assert [task for task, _ in seen] == list(range(12))
    assert {process for _, process in seen} == workers
    options = [*MIDDLING, "--output-dir", tmp_path / "run", "--backend", "dask", "--scheduler", address]
    assert command_line(*options)[0] == 0
    assert csv_bytes(tmp_path / "run") == csv_bytes(reference_run)


# ------------------------------------------------------------------ bad input


@pytest.fixture
def command_line(home, capsys):
    """main_here in the user's folder; returns exit code, output and errors."""
    return lambda *options: (main_here(home, *options), *capsys.readouterr())


CROWD = ["--preferences", "matrix.csv", *TINY]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_while_a_part_is_saved_has_the_last_word(jobs, command_line, monkeypatch, tmp_path):
    """The progress bar is the loop's that was interrupted: it ends before the line is written."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "save_arrays", interrupted)
    code, _, errors = command_line(*CROWD, "--output-dir", tmp_path / "run", "--jobs", jobs)
    assert code == 130
    assert errors.splitlines()[-1].startswith("interrupted: ")


BAD = {  # tests/test_malformed_inputs.py has all kinds; these come after a crowd was read
    "more groups than users": ([*CROWD, "--num-groups", 7], "--num-groups 7: more groups than the 6 users"),
    "more groups in the sweep": ([*CROWD, "--sweep", "--sweep-users", 3, "--sweep-groups", 4], "more groups than"),
    "fewer users than asked for": ([*CROWD, "--num-users", 40], "--num-users: 40 users: the data hold 40 users"),
    "fewer users than the sweep": ([*CROWD, "--sweep", "--sweep-users", 99], "99 users: the data hold 40 users"),
    "empty groups": ([*CROWD, "--grouping", "own_strategies:one_group"], "left group 1 of run 0 empty"),
    "overlapping groups": ([*CROWD, "--grouping", "own_strategies:overlapping"], "must give each user one group"),
    "a metric without a value of nobody": ([*CROWD, "--metric", "own_strategies:cosine"], "zero vector"),
    "a metric without a value of cheats": (
        [*CROWD, "--metric", "own_strategies:hellinger"],
        "own_strategies:hellinger: has no value for what the strategy exaggerate of the audit contributes",
    ),
    "an unknown method": ([*CROWD, "--shapley", "exct"], "--shapley exct: unknown; did you mean exact?"),
    "an unknown backend": ([*CROWD, "--backend", "lokey"], "--backend lokey: unknown; did you mean loky?"),
    "a name given twice": ([*CROWD, "--metric", "l2", "l2"], "name at least one, and each once"),
    "no name": ([*CROWD, "--metric"], "name at least one, and each once"),
    "dask without an address": ([*CROWD, "--backend", "dask"], "needs --scheduler ADDRESS"),
    "a cluster that is not there": (
        [*CROWD, "--backend", "dask", "--scheduler", "no-such-protocol://here:1"],
        "--scheduler: no-such-protocol://here:1: no dask scheduler answers",
    ),
    "a form that does not fit": ([*CROWD, "--shapley", "closed_form"], "fits --metric dot alone"),
    "a form of the static game": (
        [*CROWD, "--reference", "protocol", "--shapley", "kernel"],
        "--shapley kernel: fits --reference static alone; choose auto",
    ),
    "a closed form of the static game": (
        [*CROWD, "--metric", "dot", "--reference", "protocol", "--shapley", "closed_form"],
        "--shapley closed_form: fits --reference static alone; choose auto",
    ),
    "draws without a row a run": (
        [*CROWD, "--reference", "protocol", "--grouping", "own_strategies:one_draw"],
        "method permutation draws no row a run",
    ),
    "an unknown reference": ([*CROWD, "--reference", "dynamic"], "--reference"),
    "too many coalitions": ([*CROWD, "--num-users", 23, "--shapley", "exact"], "too many coalitions"),
    "delta 0": ([*CROWD, "--delta", 0], "--delta 0.0: out of range; must be in (0, 1]"),
    "noise below 0": ([*CROWD, "--evaluation-noise", -1], "--evaluation-noise -1.0: out of range"),
    "everybody away": ([*CROWD, "--absent", 1], "--absent 1.0: out of range"),
    "delta NaN": ([*CROWD, "--delta", "nan"], "--delta nan: out of range"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_changes_nothing(case, command_line, home, reference_run, tmp_path):
    options, told = BAD[case]
    held = tmp_path / "held"
    shutil.copytree(reference_run, held)
    before = everything_in(held)
    for folder, more in ((tmp_path / "new", []), (held, []), (held, ["--overwrite"])):
        code, _, errors = command_line(*options, "--output-dir", folder, *more)
        assert code == 2
        assert errors.startswith("error: ")
        assert told in errors
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
    assert not (tmp_path / "new").exists()
    assert everything_in(held) == before


def test_another_run_in_the_folder_is_kept(command_line, home, reference_run, tmp_path):
    (home / "other.csv").write_text((home / "matrix.csv").read_text().replace("user 3,", "user 03,"))
    held = tmp_path / "held"
    shutil.copytree(reference_run, held)
    before = everything_in(held)
    for options, told in (
        ([*MIDDLING[:-1], 8], "holds another run (seed differs)"),
        ([*MIDDLING, "--delta", 0.2], "holds another run (delta differs)"),
        ([*MIDDLING, "--preferences", "other.csv"], "holds another run (data_sha256 differs)"),
    ):
        code, _, errors = command_line(*options, "--output-dir", held)
        assert code == 2
        assert errors.startswith("error: ")
        assert told in errors
        assert errors.count("\n") == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        code, _, errors = command_line(*CROWD, "--output-dir", tmp_path / "notes", *more)
        assert code == 2
        assert "holds other files (notes.txt)" in errors
    assert everything_in(held) == before
    assert everything_in(tmp_path / "notes") == {"notes.txt": b"mine"}


def test_bad_input_as_a_shell_sees_it(home, tmp_path):
    done = run(tmp_path / "new", "--preferences", "matrix.csv", *TINY, "--metric", "l9", cwd=home, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --metric l9: unknown; [^\n]*\n", done.stderr)
    assert not (tmp_path / "new").exists()


def test_dry_run_writes_nothing(command_line, tmp_path):
    code, printed, _ = command_line(*CROWD, "--dry-run", "--output-dir", tmp_path / "new")
    assert code == 0
    assert "6 users in 2 groups: 3 runs of 5 rounds for each of 27 combinations" in printed
    assert "40 users x 5 dimensions" in printed
    assert "protocol" not in printed
    code, printed, _ = command_line(*CROWD, "--dry-run", "--reference", "protocol", "--output-dir", tmp_path / "new")
    assert code == 0
    assert "27 combinations and 81 protocol games of up to 4000 coalitions" in printed
    assert not (tmp_path / "new").exists()
