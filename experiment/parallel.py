"""The same function over many tasks: in this process, in local workers, or on a cluster the user has."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiment.errors import InputError, RunFailed

Task = TypeVar("Task")
Result = TypeVar("Result")
BACKENDS = ("loky", "threading", "dask", "ray")


def _single_threaded(function: Callable[[Task], Result], task: Task) -> Result:
    """Linear algebra on one thread: workers do not fight for cores, and sums do not depend on how many there are."""
    with threadpool_limits(1):
        return function(task)


def parallel_map(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    description: str = "",
) -> Iterator[Result]:
    """function(task) for every task, in the tasks' order, as they become ready, with a progress bar.

    jobs: how many at once. backend: one of BACKENDS. scheduler: address of a dask scheduler or a ray head node.
    Raises InputError for an unknown backend, one that is not installed, or a cluster that does not answer; RunFailed
    where a worker or the cluster goes away.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {backend}: unknown; choose from {', '.join(BACKENDS)}")
    if (jobs == 1 or len(tasks) < 2) and backend in ("loky", "threading"):
        yield from _with_bar((_single_threaded(function, task) for task in tasks), len(tasks), description)
        return
    import joblib  # half a second, which a run with one job need not wait for

    with ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(_dask_client(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        elif backend == "ray":
            _connect_ray(scheduler)
            stack.enter_context(joblib.parallel_config("ray", n_jobs=jobs))
        else:
            own = {"initializer": _start_worker, "initargs": (os.getpid(),)}
            options: dict[str, Any] = own if backend == "loky" else {}
            stack.enter_context(joblib.parallel_config(backend, n_jobs=jobs, **options))
        # ray's joblib backend has no generator
        pool = joblib.Parallel() if backend == "ray" else joblib.Parallel(return_as="generator")
        try:
            results = pool(joblib.delayed(_single_threaded)(function, task) for task in tasks)
            yield from _with_bar(results, len(tasks), description)
        except _lost_workers(backend) as error:
            ends = re.search(r"exit codes of the workers are (\{.*?\})", str(error))
            how = f"exit codes {ends[1]}" if ends else type(error).__name__
            raise RunFailed(f"a worker or the cluster went away ({how}), perhaps for want of memory") from error


def _with_bar(results: Iterable[Result], total: int, description: str) -> Iterator[Result]:
    return iter(tqdm(results, total=total, desc=description, dynamic_ncols=True, disable=not description))


def _lost_workers(backend: str) -> tuple[type[BaseException], ...]:
    """What a backend raises when workers vanish."""
    if backend == "dask":
        # Clusters are optional: imported by those who use them.
        from distributed import CancelledError, KilledWorker
        from distributed.comm import CommClosedError

        return CancelledError, KilledWorker, CommClosedError
    if backend == "ray":
        from ray.exceptions import RayActorError, RaySystemError, WorkerCrashedError

        return RayActorError, RaySystemError, WorkerCrashedError
    return (BrokenExecutor,)


def _start_worker(main_process: int) -> None:
    """What loky's own workers do not do."""
    from joblib.externals.loky import process_executor  # a worker has it already

    # Ctrl-C reaches the whole group; the main process answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # loky replaces a worker that has grown by 300 MB; one that keeps a loaded model has, and is no leak.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    Thread(target=_end_with, args=(main_process,), daemon=True).start()


def _end_with(main_process: int) -> None:
    """Ends this worker when the process that started it is gone: it would hold its memory, and write, for minutes."""
    while os.getppid() == main_process:
        time.sleep(0.5)
    os._exit(1)


def reach_cluster(backend: str, scheduler: str | None) -> None:
    """Raises InputError where the backend is a cluster that is not installed or does not answer."""
    if backend == "dask":
        _dask_client(scheduler).close()
    elif backend == "ray":
        _connect_ray(scheduler)


def _dask_client(scheduler: str | None) -> Any:
    if scheduler is None:
        raise InputError("backend dask: needs its scheduler's address, such as tcp://host:8786")
    try:
        from distributed import Client  # optional
    except ImportError:
        raise InputError("backend dask: not installed; pip install dask distributed") from None
    try:
        return Client(scheduler, timeout="10s", set_as_default=True)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"{scheduler}: no dask scheduler answers ({type(error).__name__})") from None


def _connect_ray(scheduler: str | None) -> None:
    try:
        import ray  # optional
        from ray.util.joblib import register_ray
    except ImportError:
        raise InputError("backend ray: not installed; pip install ray") from None
    try:
        ray.init(address=scheduler, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{scheduler}: no ray cluster answers ({type(error).__name__})") from None
    register_ray()
