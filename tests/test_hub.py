"""Models from a hub: what is fetched, what is kept, and what a hub that fails leads to.

The hub is a small server on the loopback address. Each load is a process of its own, since huggingface_hub reads
where hub and cache are when it is imported.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, OLD_COMMIT, serving
from tests.tiny_models import save_tiny_llama

REPOSITORY = "somebody/tiny"
FETCH = """
import sys
from experiment.errors import InputError
from point_in_space_sim.engine.assets import model_folder
try:
    print(model_folder(sys.argv[1]))
except InputError as error:
    sys.exit(f"error: {error}")
"""
LOAD = "import sys; from point_in_space_sim.engine.base_model import load_base_model as load; load(sys.argv[1], 'cpu')"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**own, "pytorch_model.bin": b"a pickle, which nobody wants", "onnx/model.json": b"{}"}


@pytest.fixture
def hub(files):
    with serving(REPOSITORY, files, {**files, "config.json": files["config.json"] + b"\n"}) as hub:
        yield hub


def start(hub, home, name, code=FETCH):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
    environment |= {"no_proxy": "*", "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(hub, home, name=REPOSITORY, code=FETCH):
    """(exit code, standard output, the last line of standard error, the requests) of a load."""
    hub.asked.clear()
    process = start(hub, home, name, code)
    out, error = process.communicate(timeout=120)
    lines = error.strip().splitlines()
    return process.returncode, out.strip(), lines[-1] if lines else "", list(hub.asked)


def test_download_then_cache_without_a_request(hub, files, tmp_path):
    code, folder, _, asked = fetch(hub, tmp_path)
    assert code == 0 and Path(folder).name == COMMIT
    got = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert got == {name: files[name] for name in files if name not in ("pytorch_model.bin", "onnx/model.json")}
    assert not any("pytorch_model" in line or "onnx" in line for line in asked)
    hub.fails = True
    assert fetch(hub, tmp_path) == (0, folder, "", [])
    code, _, error, asked = fetch(hub, tmp_path, code=LOAD)
    assert (code, asked) == (0, []), error


def test_revision(hub, files, tmp_path):
    code, folder, _, _ = fetch(hub, tmp_path, f"{REPOSITORY}@v1")
    assert code == 0 and Path(folder).name == OLD_COMMIT
    assert (Path(folder) / "config.json").read_bytes() == files["config.json"] + b"\n"
    assert fetch(hub, tmp_path, f"{REPOSITORY}@{OLD_COMMIT}")[1:] == (folder, "", [])
    code, _, error, _ = fetch(hub, tmp_path, f"{REPOSITORY}@v2")
    assert (
        code == 1
        and error == f"error: {REPOSITORY}@v2: the hub has the model but no such revision; check what follows the @"
    )


def test_unknown_id(hub, tmp_path):
    code, _, error, _ = fetch(hub, tmp_path, "somebody/else")
    assert code == 1 and error.startswith("error: somebody/else: the hub has no such model")


def test_a_download_that_broke_off_is_completed(hub, files, tmp_path):
    hub.cuts = "model.safetensors"
    code, _, error, _ = fetch(hub, tmp_path)
    assert code == 1 and error.startswith(f"error: {REPOSITORY} ") and "cannot be fetched" in error
    hub.cuts = ""
    code, folder, _, asked = fetch(hub, tmp_path)
    assert code == 0 and (Path(folder) / "model.safetensors").read_bytes() == files["model.safetensors"]
    fetched = [line.split("/")[-1] for line in asked if line.startswith("GET") and "/resolve/" in line]
    assert "model.safetensors" in fetched and len(fetched) < len(files) - 2  # of the others, what was not there yet


def test_a_cache_with_weights_but_no_tokenizer(hub, tmp_path):
    """As a program leaves it that fetches single files: huggingface_hub itself takes it for complete."""
    for name in ("config.json", "model.safetensors"):
        single = "import sys; from huggingface_hub import hf_hub_download as get; get(*sys.argv[1].split(':'))"
        assert fetch(hub, tmp_path, f"{REPOSITORY}:{name}", single)[0] == 0
    hub.fails = True
    code, _, error, _ = fetch(hub, tmp_path)
    assert code == 1 and "a tokenizer" in error
    hub.fails = False
    code, folder, _, asked = fetch(hub, tmp_path)
    assert code == 0 and (Path(folder) / "tokenizer.json").is_file()
    assert not any("GET" in line and "model.safetensors" in line for line in asked)


def test_a_slow_hub_is_named_at_once(hub, tmp_path):
    hub.open.clear()
    begin = time.perf_counter()
    process = start(hub, tmp_path, REPOSITORY)
    first = process.stderr.readline()
    assert first == f"waiting for http://127.0.0.1:{hub.server_port}\n"
    assert time.perf_counter() - begin < 5
    hub.open.set()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
