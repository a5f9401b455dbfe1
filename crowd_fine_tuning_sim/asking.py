"""Several plays side by side, each written as if it alone asked for models: ask(requests) -> their samples.

A play runs in a thread of its own and sleeps while its models are made. Models are made again only when every play has
asked or ended, so what is asked for when does not depend on how threads happen to run.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

from point_in_space_sim.engine.recipes import Drawn, Finished, Order, Request, Sampled

Ask = Callable[[Sequence[Request]], Drawn]
Result = TypeVar("Result")


def play_together(
    plays: Mapping[str, Callable[[Ask], Result]], fulfil: Callable[[Sequence[Order]], Sequence[Finished]]
) -> dict[str, Result]:
    """Each play's result, by its name, which is also the owner of its models. fulfil: see engine/variants.py.

    An error of a play, or of fulfil, ends them all and is raised.
    """
    names = list(plays)
    changed = Condition()
    busy = set(names)
    asked: dict[str, tuple[list[Request], Future[Drawn]]] = {}
    broken: list[BaseException] = []

    def play(name: str) -> Result:
        def ask(requests: Sequence[Request]) -> Drawn:
            answer: Future[Drawn] = Future()
            with changed:
                if broken:
                    raise broken[0]
                asked[name] = (list(requests), answer)
                busy.discard(name)
                changed.notify()
            return answer.result()

        try:
            return plays[name](ask)
        finally:
            with changed:
                busy.discard(name)
                changed.notify()

    with ThreadPoolExecutor(max(len(names), 1)) as threads:
        running = {name: threads.submit(play, name) for name in names}
        lacking: dict[str, list[Request]] = {}
        drawn: dict[str, dict[tuple[str, int], Sampled]] = {}
        answers: dict[str, Future[Drawn]] = {}
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: not busy)
                    new = {name: asked.pop(name) for name in names if name in asked}
                for name, (requests, answer) in new.items():
                    lacking[name], answers[name], drawn[name] = requests, answer, {}
                for future in running.values():
                    if future.done():
                        future.result()  # raises what the play raised
                if not answers:
                    return {name: future.result() for name, future in running.items()}
                orders = [(name, request) for name, (requests, _) in new.items() for request in requests]
                for (name, request), samples in fulfil(orders) if any(lacking.values()) else ():
                    drawn[name] |= samples
                    lacking[name] = [other for other in lacking[name] if other is not request]
                for name in [name for name in answers if not lacking[name]]:
                    with changed:
                        busy.add(name)
                    answers.pop(name).set_result(drawn[name])
        except BaseException as error:
            with changed:  # plays that sleep, or are about to, wake up, so that their threads end
                broken.append(error)
                for answer in [*answers.values(), *(answer for _, answer in asked.values())]:
                    answer.set_exception(error)
            raise
