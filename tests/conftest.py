"""What several test files share."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Before NumPy or torch are loaded: two test processes with two threads each wait for each other most of the time.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402

from tests.warm_command_line import WarmCommandLine  # noqa: E402


@pytest.fixture(scope="session")
def warm():
    """Both command lines in one process that has imported everything once."""
    command_line = WarmCommandLine()
    yield command_line
    command_line.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a dask scheduler with two worker processes."""
    contact = tmp_path_factory.mktemp("cluster") / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}

    def start(part, *options):
        command = [sys.executable, "-m", f"distributed.cli.dask_{part}", "--scheduler-file", str(contact), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--no-dashboard"], env=environment, cwd=contact.parent, **quiet)

    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--idle-timeout", "300s")]
    try:
        processes += [
            start("worker", "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", "--death-timeout", "60")
            for _ in range(2)
        ]
        deadline = time.monotonic() + 60
        # Begun, the file is empty for a moment.
        while not (contact.exists() and contact.read_text().endswith("}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        address = json.loads(contact.read_text())["address"]
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, {process.pid for process in processes[1:]}
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def ray_address():
    """The address of a ray cluster of two workers on this machine."""
    import ray

    address = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False).address_info["address"]
    yield address
    ray.shutdown()
