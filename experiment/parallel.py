"""The same function over many tasks: in this process, in local workers, or on a cluster the user has."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from experiment.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
BACKENDS = ("loky", "threading", "dask", "ray")


def _single_threaded(function: Callable[[Task], Result], task: Task) -> Result:
    """Linear algebra on one thread: workers do not fight for cores, and sums do not depend on how many there are."""
    from threadpoolctl import threadpool_limits

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
    Raises InputError for an unknown backend, one that is not installed, or a cluster that does not answer.
    """
    from tqdm import tqdm

    bar: Callable[[Any], Any] = lambda results: tqdm(  # noqa: E731
        results, total=len(tasks), desc=description, dynamic_ncols=True, disable=not description
    )
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend}: unknown; choose from {', '.join(BACKENDS)}")
    if (jobs == 1 or len(tasks) < 2) and backend in ("loky", "threading"):
        yield from bar(_single_threaded(function, task) for task in tasks)
        return
    import joblib

    with ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(_dask_client(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        elif backend == "ray":
            _connect_ray(scheduler)
            stack.enter_context(joblib.parallel_config("ray", n_jobs=jobs))
        else:
            options = {"initializer": _keep_worker} if backend == "loky" else {}
            stack.enter_context(joblib.parallel_config(backend, n_jobs=jobs, **options))
        # ray's joblib backend has no generator
        pool = joblib.Parallel() if backend == "ray" else joblib.Parallel(return_as="generator")
        yield from bar(pool(joblib.delayed(_single_threaded)(function, task) for task in tasks))


def _keep_worker() -> None:
    """loky replaces a worker that has grown by 300 MB; one that keeps a loaded model has, and is no leak."""
    import sys

    from joblib.externals.loky import process_executor

    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize


def _dask_client(scheduler: str | None) -> Any:
    if scheduler is None:
        raise InputError("--backend dask: needs --scheduler ADDRESS, such as tcp://host:8786")
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--backend dask: not installed; pip install dask distributed") from None
    try:
        return Client(scheduler, timeout="10s", set_as_default=True)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"--scheduler {scheduler}: no dask scheduler answers ({type(error).__name__})") from None


def _connect_ray(scheduler: str | None) -> None:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise InputError("--backend ray: not installed; pip install ray") from None
    try:
        ray.init(address=scheduler, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--scheduler {scheduler}: no ray cluster answers ({type(error).__name__})") from None
    register_ray()
