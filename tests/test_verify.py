"""python -m experiment.verify: a good run passes, and every number that is changed is named."""

import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from experiment.errors import InputError
from experiment.run_folder import output_hashes
from experiment.verify import main, verify_run
from tests.tiny_models import save_tiny_world
from tests.warm_command_line import SCRIPTS

GROUPING, POINT, *_ = SCRIPTS
GROUPING_RUN = (
    "--num-users 8 --num-groups 2 --num-rounds 12 --num-runs 4 --kernel-runs 2 --grouping random epsilon_greedy "
    "--metric l2 dot --scoring marginal ranked --sweep --sweep-users 8 --sweep-groups 2 4 --jobs 1 "
    "--preferences matrix.csv"
).split()
POINT_RUN = (
    "--base-model llama --mapper roberta/ --corpus corpus.csv --neighbours 12 --generations 2 --variants 2 --samples 4 "
    "--epochs 1 --layers 2 --rank 2 --max-new-tokens 8 --emotions joy --jobs 1"
).split()


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    home = tmp_path_factory.mktemp("verified")
    rng = np.random.default_rng(0)
    matrix = pd.DataFrame(rng.uniform(0, 5, (30, 4)).round(3), columns=list("abcd"))
    matrix.insert(0, "who", [f"user {i}" for i in range(30)])
    matrix.to_csv(home / "matrix.csv", index=False)
    save_tiny_world(home)
    for name, experiment, arguments in (("grouping", GROUPING, GROUPING_RUN), ("point", POINT, POINT_RUN)):
        answer = warm.call(experiment, [*arguments, "--output-dir", name], home, {"XDG_CACHE_HOME": home / "cache"})
        assert answer[0] == 0, answer[2]
    return home


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a run that may be changed."""

    def copied(name):
        return shutil.copytree(runs / name, tmp_path / name)

    return copied


def change(folder, table, column, change, row=0, *, hidden=True):
    """Changes one number; hidden: and its file's hash in run.json, so that only recomputing can find it."""
    path = folder / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[frame.index[row], column] = change(frame.loc[frame.index[row], column])
    frame.to_csv(path, index=False, lineterminator="\n")
    if hidden:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (folder / "run.json").write_text(json.dumps(record | {"outputs_sha256": output_hashes(folder)}))


def scaled(factor):
    return lambda value: repr(float(value) * factor)


def moved(step):
    return lambda value: repr(float(value) + step)


@pytest.mark.parametrize("name", ["grouping", "point"])
def test_good_runs_pass(name, runs, capsys):
    assert verify_run(runs / name) == ([], [])
    assert main([str(runs / name)]) == 0
    assert capsys.readouterr().out == f"{runs / name}: all agrees\n"


GROUPING_CHANGES = [
    ("runs", "start_distance", scaled(1.0001)),
    ("runs", "final_distance", scaled(1.0001)),
    ("runs", "hull_distance", scaled(1.001)),
    ("runs", "rounds_to_converge", lambda value: str(int(value) + 2)),
    ("runs", "pearson", moved(0.001)),
    ("runs", "spearman", moved(-0.1)),
    ("runs", "metric", lambda _: "dot"),
    ("rounds", "distance", scaled(1.0001)),
    ("rounds", "round", lambda _: "9"),
    ("points", "points", scaled(1.2)),
    ("points", "shapley", scaled(1.2)),
    ("points", "user", lambda _: "user 99"),
    *(
        ("summary", f"{measure}{end}", scaled(1.002))
        for measure in ("start_distance", "final_distance", "hull_distance", "regret", "pearson")
        for end in ("", "_low", "_high")
    ),
    ("summary", "runs", lambda _: "5"),
    ("summary", "spearman", moved(0.01)),
    ("paired", "difference", moved(0.01)),
    ("paired", "low", moved(0.01)),
    ("paired", "high", moved(0.01)),
    ("paired", "alternative", lambda _: "interleaved"),
    ("estimators", "pearson", moved(0.001)),
    ("sweep", "final_distance", scaled(1.01)),
    ("best", "best_share", moved(0.5)),
]


@pytest.mark.parametrize("table, column, changed", GROUPING_CHANGES)
def test_changed_numbers_of_groupings_are_named(table, column, changed, copy):
    folder = copy("grouping")
    change(folder, table, column, changed)
    differences, _ = verify_run(folder)
    # A change of the record shows in what derives from it.
    derived = {("points", "points"): ("runs.csv", "pearson"), ("points", "shapley"): ("runs.csv", "pearson")}
    derived |= {("rounds", "distance"): ("runs.csv", "start_distance")}
    derived |= {("runs", "metric"): ("runs.csv", "row 2"), ("rounds", "round"): ("rounds.csv", "row 2")}
    file, named = derived.get((table, column), (f"{table}.csv", column if column != "alternative" else "comparisons"))
    assert any(line.startswith(f"{file}: ") and named in line for line in differences), differences


POINT_CHANGES = [
    ("comments", "distance", moved(0.01)),
    ("comments", "joy", moved(0.1)),
    ("comments", "joy", lambda _: "1.5"),
    ("neighbourhoods", "distance", moved(0.01)),
    ("neighbourhoods", "rank", lambda _: "5"),
    *(
        ("generations", column, moved(0.001))
        for column in (
            *("mean_distance", "interval_low", "interval_high", "energy_distance", "centre_distance", "distinct"),
            *("distinct_2", "copied"),
        )
    ),
    *(("summary", column, moved(0.001)) for column in ("value", "low", "high")),
    ("summary", "against", lambda _: "averaged"),
]


@pytest.mark.parametrize("table, column, changed", POINT_CHANGES)
def test_changed_numbers_of_language_models_are_named(table, column, changed, copy):
    folder = copy("point")
    change(folder, table, column, changed)
    differences, _ = verify_run(folder)
    named = {"joy": "distance" if changed("0") != "1.5" else "no probability", "rank": "ranks"}.get(column, column)
    assert any(line.startswith(f"{table}.csv: ") and named in line for line in differences), differences


def test_the_kept_variant_is_the_least_distant(copy):
    folder = copy("point")
    frame = pd.read_csv(folder / "generations.csv")
    first = frame.index[(frame["role"] == "selection") & (frame["generation"] == 1) & (frame["protocol"] == "multi")]
    kept = frame.loc[first, "kept"].to_numpy()
    frame.loc[first, "kept"] = np.roll(kept, 1)
    frame.to_csv(folder / "generations.csv", index=False)
    told = verify_run(folder)[0]
    assert any("kept is not the least distant variant" in line for line in told)
    assert any("reports another variant than it kept" in line for line in told)


def test_bytes_and_files_that_are_not_the_runs(copy, capsys):
    folder = copy("point")
    change(folder, "comments", "text", lambda text: text + "!", hidden=False)
    adapter = next((folder / "adapters").glob("*/*.safetensors"))
    adapter.write_bytes(adapter.read_bytes()[:200])
    training = next((folder / "training").glob("*.jsonl"))
    training.write_text("{}\n")
    differences, _ = verify_run(folder)
    assert "comments.csv: not the bytes that the run wrote" in differences
    broken = f"adapters/{adapter.parent.name}/{adapter.name}: cannot be loaded"
    assert any(line.startswith(broken) for line in differences)
    assert any(line.startswith(f"training/{training.name}: ") for line in differences)
    assert main([str(folder)]) == 1
    assert f"{len(differences)} differences" in capsys.readouterr().out
    adapter.unlink()
    assert verify_run(folder)[0] == [f"{adapter.relative_to(folder)}: is gone"]


def test_a_run_of_users_who_are_alike_agrees(runs, warm, tmp_path):
    """Shapley values are equal and exact: their errors are 0, and no correlation is known."""
    (tmp_path / "matrix.csv").write_text("who,a,b\n" + "".join(f"u{i},3.5,2.5\n" for i in range(9)))
    options = ["--preferences", "matrix.csv", "--num-users", "5", "--num-groups", "2", "--num-rounds", "4"]
    options += ["--num-runs", "2", "--jobs", "1", "--kernel-runs", "0", "--metric", "dot", "--output-dir", "run"]
    code, _, errors = warm.call("user_grouping_evaluation_sim", options, tmp_path)
    assert code == 0, errors
    assert verify_run(tmp_path / "run")[0] == []


def test_a_packed_table_that_is_cut_off_is_told(copy):
    folder = copy("grouping")
    packed = gzip.compress((folder / "points.csv").read_bytes())
    (folder / "points.csv").unlink()
    (folder / "points.csv.gz").write_bytes(packed[:-20])
    record = json.loads((folder / "run.json").read_text())
    record["outputs_sha256"]["points.csv.gz"] = record["outputs_sha256"].pop("points.csv")
    (folder / "run.json").write_text(json.dumps(record))
    differences, _ = verify_run(folder)
    assert differences[0] == "points.csv.gz: not the bytes that the run wrote"
    assert differences[1].startswith("the tables or run.json cannot be read")


def test_tables_can_be_handed_on_alone(copy):
    folder = copy("point")
    count = len(list(folder.glob("adapters/**/*.safetensors")))
    for name in ("adapters", "training", "games"):
        shutil.rmtree(folder / name)
    differences, unchecked = verify_run(folder)
    assert differences == []
    gone = [f"adapters: {count} files are not here", "games: 1 file is not here"]
    assert unchecked == [*gone, "training: what variants were tuned on is not here"]


@pytest.mark.parametrize(
    "name, file, told",
    [
        ("grouping", "matrix.csv", "is not the data of this run"),
        ("point", "corpus.csv", "is not the corpus of this run"),
        ("point", "roberta/config.json", "mapper: "),
        ("point", "llama/model.safetensors", "base_model: "),
    ],
)
def test_other_data_and_models_are_told(name, file, told, runs):
    path = runs / file
    held = path.read_bytes()
    lines = held.split(b"\n")
    path.write_bytes(b"\n".join(lines[:-2] + lines[-1:]) if file.endswith("csv") else held + b" ")
    try:
        differences, _ = verify_run(runs / name)
        assert len(differences) == 1 and told in differences[0]
        path.rename(path.with_name("away"))
        assert verify_run(runs / name)[1] or "mapper" in told
    finally:
        path.with_name("away").unlink(missing_ok=True)
        path.write_bytes(held)


def test_missing_rows_are_told(copy):
    for name, table in (("grouping", "points"), ("point", "comments")):
        folder = copy(name)
        lines = (folder / f"{table}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{table}.csv").write_text("".join(lines[:-1]), encoding="utf-8")
        assert any(line.startswith(f"{table}.csv: ") for line in verify_run(folder)[0])


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"experiment": "os"}', '{"experiment": "../../evil"}'])
def test_what_is_no_run(record, tmp_path, capsys):
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    with pytest.raises(InputError):
        verify_run(tmp_path)
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_help(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().out


def test_a_run_with_another_mapper_or_data_is_not_mixed_in(warm, runs):
    """The same options, other content: refused, and nothing changes."""
    environment = {"XDG_CACHE_HOME": runs / "cache"}
    held = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and "cache" not in path.parts}
    for name, experiment, arguments, file, told in (
        ("grouping", GROUPING, GROUPING_RUN, "matrix.csv", "data_sha256 differs"),
        ("point", POINT, POINT_RUN, "roberta/config.json", "mapper_sha256 differs"),
        ("point", POINT, POINT_RUN, "corpus.csv", "corpus_sha256 differs"),
    ):
        lines = held[runs / file].split(b"\n")
        other = b"\n".join(lines[:-2] + lines[-1:]) if file.endswith("csv") else held[runs / file] + b" "
        (runs / file).write_bytes(other)
        code, _, errors = warm.call(experiment, [*arguments, "--output-dir", name], runs, environment)
        (runs / file).write_bytes(held[runs / file])
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"error: {name}: holds another run ({told})")
    assert {path: path.read_bytes() for path in held} == held
