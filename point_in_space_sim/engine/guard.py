"""One line in place of whatever a library raises about a model that it cannot use."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from experiment.errors import InputError


@contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
    """Any error inside becomes an InputError, "what (reason); advice"; too little memory becomes a MemoryError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers, peft, safetensors and tokenizers raise many types
        if is_out_of_memory(error):
            raise MemoryError(reason(error)) from error
        raise InputError(f"{what} ({reason(error)}); {advice}") from error


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C takes effect at the end: inside a constructor, torch makes a ValueError of it, as of a damaged file."""
    if threading.current_thread() is not threading.main_thread():  # only there it arrives
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def is_out_of_memory(error: Exception) -> bool:
    """torch has an error of its own for it on CUDA only; on a CPU the message says so."""
    message = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(
        sign in message for sign in ("allocate memory", "not enough memory", "out of memory")
    )


def reason(error: Exception) -> str:
    """The first line that an error says, or its type."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
