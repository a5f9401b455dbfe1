"""The command line end to end on tiny models: files, resumption after a kill, added targets, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from experiment.command_line import run_script
from experiment.verify import verify_run
from point_in_space_sim import run as run_module
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine import variants
from point_in_space_sim.protocols import PROTOCOLS, Draw, Protocol
from point_in_space_sim.results import pick, read_table
from tests.tiny_models import save_tiny_corpus, save_tiny_world, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("comments", "generations", "neighbourhoods", "summary")
FIGURES = ("competition", "generations", "single_against_multi", "distances", "movement", "selection")
OFFERED = [name for name in PROTOCOLS if name != "oracle"]  # which is the single model, where nobody is off target


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def arguments(world, output, *more, figures):
    options = {
        "--base-model": world / "llama",
        "--mapper": world / "roberta",
        "--corpus": world / "corpus.csv",
        "--neighbours": 20,
        "--generations": 2,
        "--samples": 5,
        "--epochs": 2,
        "--layers": 2,
        "--rank": 4,
        "--max-new-tokens": 10,
        "--emotions": "joy",
        "--jobs": 1,
        "--output-dir": output,
    }
    given = [str(part) for option in options.items() for part in option]
    given += [] if figures else ["--no-figures"]
    return [str(ROOT / "point_in_space_sim" / "run.py"), *given, *map(str, more)]


def run_here(monkeypatch, world, output, *more, figures=False):
    """Exit code of the script in this process. figures: draw them, which takes longer than all else."""
    monkeypatch.setattr(sys, "argv", arguments(world, output, *more, figures=figures))
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    return run_script("point_in_space_sim.main", run_module.Settings, run_module.PRESETS, run_module.__doc__)


def start(world, output, *more):
    environment = {**os.environ, "XDG_CACHE_HOME": str(world / "cache")}
    return subprocess.Popen(
        [sys.executable, *arguments(world, output, *more, figures=True)],
        cwd=world,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(world):
    """A run of the script from another folder, and what it printed."""
    output = world / "finished"
    process = start(world, output)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, printed


def content(folder):
    """Everything that equal runs must have in common, as bytes."""
    paths = [
        *folder.glob("*.csv"),
        *folder.glob("*.md"),
        *folder.glob("*.png"),
        *folder.glob("training/*"),
        *folder.glob("adapters/*/*.safetensors"),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_files_of_a_run(finished):
    folder, printed = finished
    lines = printed.splitlines()
    played = "single, chosen, filter, multi (2 x 3), multi_plus, random_pick, averaged"
    assert lines[0].startswith(f"joy; 1 seed; {played}; ")
    assert "about" in lines[0]
    assert f"results in {folder}: joy: mean distance" in lines[-1] and "plus minus chosen" in lines[-1]
    for name in TABLES:
        assert (folder / f"{name}.csv").is_file()
    for name in FIGURES:
        assert (folder / f"{name}.png").stat().st_size > 5000 and (folder / f"{name}.pdf").stat().st_size > 5000
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.csv" for name in TABLES),
        *(f"{name}.{end}" for name in FIGURES for end in ("png", "pdf")),
        "comments.md",
        "report.html",
        "run.json",
        "training",
        "adapters",
        "games",
    }
    record = json.loads((folder / "run.json").read_text())
    assert record["emotions"] == ["joy"] and record["neighbours"] == 20 and record["epochs"] == 2
    assert record["protocols"] == OFFERED
    prompt = "<|im_start|>user\nWrite a Reddit comment.<|im_end|>\n<|im_start|>assistant\n"
    assert record["rendered_prompt"] == prompt
    for name in ("base_model_sha256", "mapper_sha256", "corpus_sha256"):
        assert len(record[name]) == 64
    page = (folder / "comments.md").read_text()
    assert page.count("mean ") >= 8 and "## joy" in page


def test_comments_and_their_distances(finished):
    folder, _ = finished
    comments, near = read_table(folder, "comments"), read_table(folder, "neighbourhoods")
    assert list(comments) == [
        "emotion",
        "protocol",
        "generation",
        "variant",
        "seed",
        "role",
        "text",
        *EMOTIONS,
        "distance",
    ]
    # base; three single; three to choose from and one; filter; (three variants, one report) x 2 generations, with the
    # incumbent by plus selection; three chains x 2; average x 2.
    assert len(comments) == 5 * (1 + 3 + 4 + 1 + 2 * 4 + 2 * 5 + 2 * 3 + 2)
    centroid = near.loc[near["rank"] > 0, list(EMOTIONS)].mean().to_numpy()
    distances = np.linalg.norm(comments[list(EMOTIONS)].to_numpy() - centroid, axis=1)
    assert comments["distance"].to_numpy() == pytest.approx(distances, abs=1e-3)
    kept = comments[(comments["protocol"] == "multi") & (comments["generation"] == 1)]
    fresh = kept[kept["role"] == "report"]
    chosen = kept[(kept["role"] == "selection") & (kept["variant"] == fresh["variant"].iloc[0])]
    assert len(chosen) == 5 and set(chosen["text"]) != set(fresh["text"])


def test_generations_and_summary(finished):
    folder, _ = finished
    comments, generations = read_table(folder, "comments"), read_table(folder, "generations")
    summary = read_table(folder, "summary")
    assert (generations["interval_low"] <= generations["mean_distance"]).all()
    assert (generations["mean_distance"] <= generations["interval_high"]).all()
    multi = generations[generations["protocol"] == "multi"]
    assert multi[multi["role"] == "selection"]["training_comments"].tolist() == [6, 6, 6, 4, 4, 4]
    for _, own in multi[multi["role"] == "selection"].groupby("generation"):
        assert own["kept"].sum() == 1 and own.loc[own["kept"], "mean_distance"].item() == own["mean_distance"].min()
    single = generations[generations["protocol"] == "single"]
    assert single["training_comments"].tolist() == [6, 13, 20]

    def mean(protocol, generation):
        rows = comments[(comments["protocol"] == protocol) & (comments["generation"] == generation)]
        return rows.loc[rows["role"] == "report", "distance"].mean()

    def said(*which):
        return pick(summary, *which)["value"].item()

    assert said("distance", "single") == pytest.approx(mean("single", 3), abs=1e-5)
    assert said("distance", "multi") == pytest.approx(mean("multi", 2), abs=1e-5)
    reduced = 100 * (1 - mean("multi", 2) / mean("single", 3))
    assert said("reduction_percent", "multi", "single") == pytest.approx(reduced, abs=1e-3)
    for other, generation in (("averaged", 2), ("random_pick", 2), ("chosen", 1), ("filter", 1)):
        difference = mean("multi_plus", 2) - mean(other, generation)
        assert said("distance", "multi_plus", other) == pytest.approx(difference, abs=1e-5)
    assert (summary["low"].isna() | (summary["low"] <= summary["value"])).all()


def test_training_files_and_kept_adapters(finished, world):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = finished
    corpus = set(pd.read_csv(world / "corpus.csv")["text"])
    files = sorted((folder / "training").glob("*.jsonl"))
    of_incumbents = [path for path in files if path.name.endswith("-variant-0.jsonl")]
    assert len(files) - len(of_incumbents) == 3 + 3 + 1 + 2 * 3 + 2 * 3 + 2 * 3 + 2 * 3
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            user, assistant = json.loads(line)["messages"]
            assert (user["role"], user["content"]) == ("user", "Write a Reddit comment.")
            assert assistant["role"] == "assistant" and assistant["content"] in corpus
    kept = {path.name for path in (folder / "adapters").iterdir()}
    report = read_table(folder, "generations").query("role == 'report' and training_comments > 0")  # not the base model
    keeping = report[report["protocol"].isin(["single", "multi", "multi_plus", "averaged"])]
    assert kept == {f"joy-seed-0-{row.protocol}-{row.generation}" for row in keeping.itertuples()}
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    PeftModel.from_pretrained(base, str(folder / "adapters" / "joy-seed-0-averaged-2"))


def test_killed_run_goes_on_and_ends_with_the_same_bytes(finished, world, monkeypatch):
    output = world / "killed"
    process = start(world, output)
    deadline = time.monotonic() + 120
    # In the middle: some models made, others not.
    while len(list(output.glob(".parts/*/*/models/*"))) < 5 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made = {path.name for path in output.glob(".parts/*/*/models/*")}
    assert not (output / "run.json").exists() and len(made) >= 5

    tuned = []
    tune = variants.tune
    monkeypatch.setattr(variants, "tune", lambda *given, **more: tuned.append(given) or tune(*given, **more))
    assert run_here(monkeypatch, world, output, figures=True) == 0
    # A rehearsal; 3 single, 3 shared, 3 each of two competitions, 3 chains and 3 averaged in the second generation.
    assert 1 < len(tuned) <= 1 + 18 - (len(made) - 1)
    assert content(output) == content(finished[0])
    assert not (output / ".parts").exists()


def test_results_do_not_depend_on_jobs(world, monkeypatch, tmp_path):
    small = ["--generations", 1, "--variants", 2, "--neighbours", 6, "--samples", 3]
    for jobs in (1, 2):
        assert run_here(monkeypatch, world, tmp_path / str(jobs), *small, "--jobs", jobs) == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_clusters_and_threads_give_the_same_bytes(world, monkeypatch, tmp_path, cluster, ray_address):
    """Dask's and ray's workers share no folder with the run; threads share a model, one at a time."""
    small = ["--generations", 2, "--variants", 2, "--neighbours", 9, "--samples", 2, "--protocols", "multi_plus"]
    assert run_here(monkeypatch, world, tmp_path / "here", *small) == 0
    ways = {"dask": ["--scheduler", cluster[0]], "threading": ["--jobs", 3]}
    ways["ray"] = ["--scheduler", ray_address, "--jobs", 2]
    for backend, options in ways.items():
        assert run_here(monkeypatch, world, tmp_path / backend, *small, "--backend", backend, *options) == 0
        assert content(tmp_path / backend) == content(tmp_path / "here")


def test_finished_target_is_not_run_again_and_others_are_added(finished, world, monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = content(folder)
    assert run_here(monkeypatch, world, folder) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert content(folder) == before
    weights = folder / "adapters" / "joy-seed-0-multi-2" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert run_here(monkeypatch, world, folder, "--target-emotions", "joy=0.7,fear=0.3") == 0
    summary = read_table(folder, "summary")
    assert list(summary["emotion"].unique()) == ["joy", "joy=0.7,fear=0.3"]
    assert weights.stat().st_mtime_ns == written
    old = read_table(folder, "comments").query("emotion == 'joy'")
    assert old.to_csv(index=False, lineterminator="\n").encode() == before["comments.csv"]
    assert json.loads((folder / "run.json").read_text())["emotions"] == ["joy", "joy=0.7,fear=0.3"]
    # Added without figures: those of joy alone are gone.
    assert not [*folder.glob("*.png"), *folder.glob("*.pdf")]
    assert "joy=0.7" in (folder / "comments.md").read_text(encoding="utf-8")
    assert "<img" in (finished[0] / "report.html").read_text() and "<img" not in (folder / "report.html").read_text()


def test_a_run_that_was_handed_on_without_its_games(finished, world, monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("games", "adapters", "training"):
        shutil.rmtree(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run_here(monkeypatch, world, folder) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert run_here(monkeypatch, world, folder, "--emotions", "joy", "fear") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "without" not in line and "games (games/) of joy are not here" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def thirds(game):
    """A protocol of the tests: competes with itself, on thirds of the pool in order."""
    models = [game.tuned(game.pool.texts[i::3], None, 1) for i in range(3)]
    seed = game.seed_of("selection", 1)
    drawn = yield [variants.Request(model, (seed,)) for model in models]
    winner = game.nearest([drawn[model.name, seed] for model in models])
    yield [game.asks(models[winner], "thirds", 1)]
    return [
        *(Draw("thirds", 1, i + 1, "selection", model, seed, i == winner) for i, model in enumerate(models)),
        Draw("thirds", 1, winner + 1, "report", models[winner], game.report),
    ]


def test_a_new_protocol_is_a_function_and_a_line(world, monkeypatch, tmp_path, capsys):
    entry = Protocol(thirds, "thirds in their order", "thirds", against=("multi", "averaged"))
    monkeypatch.setitem(PROTOCOLS, "thirds", entry)
    options = ["--protocols", "thirds", "random_pick", "--generations", 1, "--neighbours", 9]
    assert run_here(monkeypatch, world, tmp_path / "run", *options, figures=True) == 0
    assert "; single, multi (1 x 3), random_pick, thirds; " in capsys.readouterr().out
    protocols = ["base", "single", "multi", "random_pick", "thirds"]
    comments, summary = read_table(tmp_path / "run", "comments"), read_table(tmp_path / "run", "summary")
    assert list(comments["protocol"].unique()) == protocols
    distances = [pick(summary, "distance", protocol)["value"].item() for protocol in protocols]
    report = comments[comments["role"] == "report"]
    final = report[(report["protocol"] != "single") | (report["generation"] == 3)]
    last = final.groupby("protocol")["distance"].mean()
    assert distances == pytest.approx([last[protocol] for protocol in protocols], abs=1e-5)
    against = pick(summary, "energy", "thirds", "multi")["value"].item()
    each = [pick(summary, "energy", protocol)["value"].item() for protocol in ("thirds", "multi")]
    assert against == pytest.approx(each[0] - each[1], abs=2e-6)
    assert len(pick(summary, "distance", "thirds", "selection")) == len(pick(summary, "copied", "thirds")) == 1
    assert "averaged" not in set(summary["protocol"]) | set(summary["against"])  # it was not played
    for name in FIGURES:
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 5000
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "thirds in their order" in page and "thirds − multi" in page
    assert verify_run(tmp_path / "run") == ([], [])
    # The same game is the same whatever else is played beside it.
    assert run_here(monkeypatch, world, tmp_path / "less", *options[:1], "multi", *options[3:]) == 0
    less = read_table(tmp_path / "less", "comments")
    pd.testing.assert_frame_equal(less, comments[comments["protocol"].isin(protocols[:3])].reset_index(drop=True))


def test_a_pool_of_users_of_whom_some_are_off_target(world, monkeypatch, tmp_path, capsys):
    options = ["--contamination", 1 / 3, "--deal", "user", "--num-users", 6, "--neighbours", 20, "--num-seeds", 2]
    options += ["--protocols", "oracle", "filter", "multi_plus", "--samples", 2, "--epochs", 1]
    assert run_here(monkeypatch, world, tmp_path / "run", *options) == 0
    assert "; single, filter, oracle, multi (2 x 3), multi_plus; " in capsys.readouterr().out
    users, near = read_table(tmp_path / "run", "users"), read_table(tmp_path / "run", "neighbourhoods")
    corpus = pd.read_csv(world / "corpus.csv")["text"].tolist()
    members = set(near.loc[near["rank"] > 0, "text"])
    for _, own in users.groupby("seed"):
        assert own.groupby("user").size().tolist() == [3] * 6 and len(set(own["text"])) == 18
        assert own.groupby("user")["on_target"].first().tolist() == [True] * 4 + [False] * 2
        assert set(own.loc[own["on_target"], "text"]) <= members
        off = own[~own["on_target"]]
        assert not set(off["text"]) & members and set(off["text"]) <= set(corpus)
        assert off["writes"].nunique() == 2 and "joy" not in set(off["writes"])
    training = tmp_path / "run" / "training"

    def tuned_on(name):
        lines = (training / f"joy-seed-0-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["messages"][1]["content"] for line in lines}

    first = users[users["seed"] == 0]
    assert tuned_on("oracle-1-variant-1") == set(first.loc[first["on_target"], "text"])
    assert tuned_on("single-3-variant-1") == set(first["text"])
    # Six users hold three of the 20 neighbours each.
    assert "Single model on 18 comments" in (tmp_path / "run" / "comments.md").read_text(encoding="utf-8")
    assert " 1 target, 2 seeds each." in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    held = [set(texts) for _, texts in first.groupby("user")["text"]]
    for variant in (1, 2, 3):
        part = tuned_on(f"multi-1-variant-{variant}")
        assert len(part) == 6 and sum(user <= part for user in held) == 2
    assert verify_run(tmp_path / "run") == ([], [])


def test_choice_by_the_target(finished, world, monkeypatch, tmp_path):
    """What is kept is the nearest to the target's own vector; reported distances stay those to the centroid."""
    options = ["--choose-by", "target", "--generations", 1, "--samples", 4, "--prompt", "Say something."]
    assert run_here(monkeypatch, world, tmp_path / "run", *options) == 0
    comments, near = (read_table(tmp_path / "run", name) for name in ("comments", "neighbourhoods"))
    generations = read_table(tmp_path / "run", "generations")
    chosen = comments[(comments["role"] == "selection") & (comments["protocol"] == "multi")]
    target, labels = near.loc[near["rank"] == 0, list(EMOTIONS)].to_numpy()[0], list(EMOTIONS)
    to_target = chosen.assign(own=np.linalg.norm(chosen[labels] - target, axis=1)).groupby("variant")["own"].mean()
    kept = generations.query("role == 'selection' and kept and protocol == 'multi'")["variant"].item()
    assert kept == to_target.idxmin()
    centroid = near.loc[near["rank"] > 0, labels].mean().to_numpy()
    assert comments["distance"].to_numpy() == pytest.approx(
        np.linalg.norm(comments[labels].to_numpy() - centroid, axis=1), abs=1e-3
    )
    assert verify_run(tmp_path / "run") == ([], [])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["prompt"] == "Say something." and "Say something." in record["rendered_prompt"]
    first = next((tmp_path / "run" / "training").glob("*.jsonl")).read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first)["messages"][0]["content"] == "Say something."


def test_full_tuning_of_a_text_target(world, monkeypatch, tmp_path):
    text = r"$5 for 10% of $_$ a day"  # no formula, though figures could take it for one
    assert (
        run_here(
            monkeypatch,
            world,
            tmp_path / "run",
            "--target-text",
            text,
            "--tuning",
            "full",
            "--generations",
            1,
            "--variants",
            2,
            "--learning-rate",
            1e-3,
            figures=True,
        )
        == 0
    )
    summary = read_table(tmp_path / "run", "summary")
    assert set(summary["emotion"]) == {f'"{text}"'}
    (kept,) = (tmp_path / "run" / "adapters").glob("*-multi-1")
    variants.load_base_model(str(kept), "cpu")


def test_dry_run_says_what_it_would_do(world, monkeypatch, capsys, tmp_path):
    assert run_here(monkeypatch, world, tmp_path / "run", "--dry-run", "--emotions", "all") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("28 targets; 1 seed") and "about" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--emotions", "jyo"], "did you mean joy"),
        (["--neighbours", "60"], "--neighbours 60: the corpus has 59 comments beside the target"),
        (["--generations", "30"], "--neighbours 20: too few for 3 variants and 30 generations"),
        (["--contamination", "1.5"], "--contamination 1.5: out of range"),
        (["--contamination", "0.97"], "leaves no user on target"),
        (["--contamination", "0.5", "--num-users", "30"], "--num-users 30: out of range"),
        (["--deal", "user", "--num-users", "4", "--generations", "3"], "--num-users 4: too few for 3 variants"),
        (["--backend", "dask"], "needs --scheduler ADDRESS"),
        (["--backend", "dask", "--scheduler", "no-such-protocol://x:1"], "no dask scheduler answers"),
        (["--target-emotions", "joy:1"], "not EMOTION=PROBABILITY"),
        (["--target-emotions", "joy=1", "--target-text", "a"], "give one of them"),
        (["--target-text", " "], "is empty"),
        (["--variants", "1"], "--variants 1: out of range"),
        (["--samples", "1"], "--samples 1: out of range"),
        (["--protocols", "mutli"], "did you mean multi"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--choose-by", "luck"], "choose-by"),
        (["--learning-rate", "0"], "--learning-rate 0.0: out of range"),
        (["--preset", "quik"], "did you mean quick"),
        (["--device", "abacus"], "abacus"),
        (["--corpus", "nowhere.csv"], "nowhere.csv"),
        (["--base-model", "./nowhere"], "nowhere"),
        (["--mapper", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(world, monkeypatch, capsys, tmp_path, more, message):
    assert run_here(monkeypatch, world, tmp_path / "run", *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        ("--base-model", "positions", "index out of range"),  # fewer than a sample may take
        ("--mapper", "padding", "padding token"),
    ],
)
def test_models_that_cannot_be_used_are_found_before_anything_is_written(
    world, monkeypatch, capsys, tmp_path, option, kind, message
):
    labels = {"id2label": dict(enumerate(EMOTIONS)), "label2id": {name: i for i, name in enumerate(EMOTIONS)}}
    vocabulary = save_tokenizer(tmp_path / kind)
    config = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "positions":
        model = GPT2LMHeadModel(GPT2Config(n_positions=40, **config))
    else:
        multi_label = {"problem_type": "multi_label_classification"}
        model = GPT2ForSequenceClassification(GPT2Config(n_positions=256, **config, **labels, **multi_label))
    model.save_pretrained(tmp_path / kind)
    code = run_here(monkeypatch, world, tmp_path / "run", option, tmp_path / kind, "--max-new-tokens", 48)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2 and message in line
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_refused(finished, world, monkeypatch, capsys, tmp_path):
    before = content(finished[0])
    assert run_here(monkeypatch, world, finished[0], "--samples", 6) == 2
    assert "holds another run (samples differs)" in capsys.readouterr().err
    corpus = save_tiny_corpus(tmp_path / "other.csv", 61)
    assert run_here(monkeypatch, world, finished[0], "--corpus", corpus) == 2
    assert "holds another run" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run_here(monkeypatch, world, tmp_path / "run") == 2
    assert "holds other files (notes.txt)" in capsys.readouterr().err
    assert content(finished[0]) == before


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['run.py', '--help']\n"
        "try: runpy.run_path('point_in_space_sim/run.py', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--target-emotions" in done.stdout and done.stdout.endswith("code 0\nset()\n")
