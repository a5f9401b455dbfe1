"""The same function over many tasks: in this process, in local workers, or on a cluster the user has."""

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from queue import Queue
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiment.errors import InputError, RunFailed

Task = TypeVar("Task")
Result = TypeVar("Result")
Submit = Callable[..., "Future[Any]"]
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
) -> Generator[Result, None, None]:
    """function(task) for every task, in the tasks' order, as they become ready, with a progress bar. See workers.

    Who works with the results while others are made closes it (contextlib.closing): what is interrupted there would
    leave bar and workers to the garbage collector.
    """
    with workers(min(jobs, len(tasks)), backend, scheduler) as (submit, at_once):
        waiting = iter(tasks)
        # In this process a task is finished when it is submitted; workers never wait for the next.
        ahead = 1 if at_once == 1 else len(tasks)
        futures = deque(submit(function, task) for task in islice(waiting, ahead))
        with tqdm(total=len(tasks), desc=description, dynamic_ncols=True, disable=not description) as bar:
            while futures:
                result = futures.popleft().result()
                bar.update()
                yield result
                futures.extend(submit(function, task) for task in islice(waiting, 1))


@contextmanager
def workers(
    jobs: int, backend: str = "loky", scheduler: str | None = None, devices: Sequence[str] = ()
) -> Iterator[tuple[Submit, int]]:
    """A function that has a worker call `function(task)`, giving its Future, and how many tasks run at once.

    Each has one thread for its linear algebra. jobs: how many workers of a local backend or of ray; one is this
    process. backend: one of BACKENDS. scheduler: address of a dask scheduler, whose workers are all used, or of a ray
    head node. devices: of CUDA; each of several gets one worker, which sees no other.
    Raises InputError for an unknown backend, one that is not installed, or a cluster that does not answer; RunFailed
    where a worker or the cluster goes away. On any error what is still to do is dropped.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {backend}: unknown; choose from {', '.join(BACKENDS)}")
    jobs = max(jobs, 1)
    with ExitStack() as stack:
        if backend == "dask":
            client = stack.enter_context(_dask_client(scheduler))
            pool = client.get_executor(pure=False)
            stack.callback(pool.shutdown, wait=False)
            started, at_once = pool.submit, max(sum(client.nthreads().values()), 1)
        elif backend == "ray":
            started, at_once = stack.enter_context(_ray_workers(scheduler, jobs)), jobs
        elif len(devices) > 1:
            started, at_once = stack.enter_context(_one_a_device(devices)), len(devices)
        elif jobs <= 1:
            started, at_once = _in_this_process, 1
        elif backend == "threading":
            threads = ThreadPoolExecutor(jobs)
            stack.callback(threads.shutdown, cancel_futures=True)
            started, at_once = threads.submit, jobs
        else:
            started, at_once = stack.enter_context(_processes(jobs)), jobs
        try:
            yield partial(started, _single_threaded), at_once
        except _lost_workers(backend) as error:
            ends = re.search(r"exit codes of the workers are (\{.*?\})", str(error))
            how = f"exit codes {ends[1]}" if ends else type(error).__name__
            raise RunFailed(f"a worker or the cluster went away ({how}), perhaps for want of memory") from error


def _in_this_process(function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
    future: Future[Result] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def _processes(jobs: int) -> Iterator[Submit]:
    """Workers that the next call finds again; on an error they end."""
    from joblib.externals.loky import get_reusable_executor  # half a second, which a run with one job need not wait for

    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    pool = get_reusable_executor(jobs, timeout=300, initializer=_start_worker, initargs=(os.getpid(),), env=one_thread)
    try:
        yield pool.submit
    except BaseException:
        pool.shutdown(wait=True, kill_workers=True)
        raise


@contextmanager
def _one_a_device(devices: Sequence[str]) -> Iterator[Submit]:
    """A process for every device, which has no other in sight: nothing loads a model on one by mistake."""
    from joblib.externals.loky import ProcessPoolExecutor

    free: Queue[ProcessPoolExecutor] = Queue()
    for device in devices:
        own = {"CUDA_VISIBLE_DEVICES": device}
        free.put(ProcessPoolExecutor(1, timeout=None, initializer=_start_worker, initargs=(os.getpid(),), env=own))
    pools = list(free.queue)

    def submit(function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        pool = free.get()
        future: Future[Result] = pool.submit(function, *arguments)
        future.add_done_callback(lambda _: free.put(pool))
        return future

    try:
        yield submit
    finally:
        for pool in pools:
            pool.shutdown(wait=True, kill_workers=True)


@contextmanager
def _ray_workers(scheduler: str | None, jobs: int) -> Iterator[Submit]:
    """A thread waits for each of ray's tasks: its own futures are no concurrent ones."""
    ray = _connect_ray(scheduler)

    def wait_for(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ray.get(ray.remote(function).remote(*arguments))
        except ray.exceptions.RayTaskError as error:  # it says the worker's whole traceback
            raise error.cause from error

    def submit(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        return threads.submit(wait_for, function, *arguments)

    threads = ThreadPoolExecutor(jobs)
    try:
        yield submit
    finally:
        threads.shutdown(cancel_futures=True)


def _lost_workers(backend: str) -> tuple[type[BaseException], ...]:
    """What a backend raises when workers vanish."""
    if backend == "dask":
        # Clusters are optional: imported by those who use them.
        from distributed import CancelledError, KilledWorker
        from distributed.comm import CommClosedError

        return CancelledError, KilledWorker, CommClosedError
    if backend == "ray":
        from ray.exceptions import RaySystemError, WorkerCrashedError

        return RaySystemError, WorkerCrashedError
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


def reach_cluster_again(backend: str, scheduler: str | None) -> None:
    """As reach_cluster, of one that answered when the run began: raises RunFailed, and what is finished is kept."""
    try:
        reach_cluster(backend, scheduler)
    except InputError as error:
        raise RunFailed(str(error)) from error


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


def _connect_ray(scheduler: str | None) -> Any:
    try:
        import ray  # optional
    except ImportError:
        raise InputError("backend ray: not installed; pip install ray") from None
    try:
        ray.init(address=scheduler, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{scheduler}: no ray cluster answers ({type(error).__name__})") from None
    return ray
