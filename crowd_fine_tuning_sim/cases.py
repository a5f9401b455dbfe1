"""What is played: repetitions of crowds, and what a finished one is saved as."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from crowd_fine_tuning_sim.crowds import Crowd, Person
from crowd_fine_tuning_sim.settings import Settings
from crowd_fine_tuning_sim.text_world import Streams
from experiment.errors import InputError
from experiment.run_folder import Arrays, load_arrays, read_record
from experiment.tables import read_table

Combination = tuple[str, str, str]
"""(grouping, metric, scoring)"""
CASES = "cases"  # the folder of the finished ones
CASE = ["target", "crowd", "seed"]
COMBINATION = ["grouping", "metric", "scoring"]


@dataclass(frozen=True)
class Case:
    """One repetition of one crowd."""

    crowd: Crowd
    number: int  # of the target's crowds
    seed: int

    @property
    def streams(self) -> Streams:
        return Streams(self.seed, f"{self.crowd.target} {self.number}")

    @property
    def name(self) -> str:
        return case_name(self.crowd.target, self.number, self.seed)


def case_name(target: str, number: int, seed: int) -> str:
    return f"{target}-crowd-{number}-seed-{seed}"


def case_keys(targets: Sequence[str], num_crowds: int, num_seeds: int, seed: int) -> list[tuple[str, int, int]]:
    """Target, crowd's number and seed of a run's cases, in the order in which they are played. seed: the first."""
    seeds, numbers = range(seed, seed + num_seeds), range(1, num_crowds + 1)
    return [(target, number, each) for each in seeds for target in targets for number in numbers]


@dataclass(frozen=True)
class Played:
    """A case with what was played. competitions: by combination. retraining: see plays.play_retraining. again: the same
    crowd's other seeds."""

    case: Case
    competitions: dict[Combination, Arrays]
    retraining: Arrays
    in_run: np.ndarray  # (n,)
    again: tuple["Played", ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        return {"target": self.case.crowd.target, "crowd": self.case.number, "seed": self.case.seed}

    @property
    def means(self) -> np.ndarray:
        """(n, 28), of the texts that each person holds at first."""
        return self.case.crowd.means_at(0.0)

    @property
    def base(self) -> np.ndarray:
        """(28,), of what the untuned model writes."""
        return self.retraining["vectors"][0].astype(np.float64).mean(axis=0)


def combinations_of(settings: Settings) -> list[Combination]:
    return list(product(settings.grouping, settings.metric, settings.scoring))


def played_case(settings: Settings, case: Case, arrays: Arrays) -> Played:
    """From the arrays that a case was saved as: of each competition by its number, in_run and retraining."""
    own: dict[str, Arrays] = {}
    for key, values in arrays.items():
        owner, _, name = key.partition("/")
        own.setdefault(owner, {})[name] = values
    numbered = {each: own[str(number)] for number, each in enumerate(combinations_of(settings))}
    return Played(case, numbered, own["retraining"], own["in_run"]["values"])


def crowd_arrays(crowd: Crowd) -> Arrays:
    """A crowd without names and texts. vectors, later: (all people's texts, 28), counts of each person's: (n,)."""
    return {
        "near": crowd.near,
        "vectors": np.concatenate(crowd.vectors),
        "later": np.concatenate(crowd.later),
        "counts": np.array([len(own) for own in crowd.vectors]),
        "later_counts": np.array([len(own) for own in crowd.later]),
    }


def crowd_without_texts(target: str, arrays: Arrays, names: Sequence[str], kinds: Sequence[str]) -> Crowd:
    """From crowd_arrays; a text is empty."""
    vectors, later = (
        tuple(np.split(arrays[f"crowd/{name}"], arrays[f"crowd/{counts}"].cumsum()[:-1]))
        for name, counts in (("vectors", "counts"), ("later", "later_counts"))
    )
    people = tuple(
        Person(name, kind, ("",) * len(first), ("",) * len(then))
        for name, kind, first, then in zip(names, kinds, vectors, later, strict=True)
    )
    return Crowd(people, target, arrays["crowd/near"], (), vectors, later)


def read_cases(folder: str | Path) -> tuple[Settings, list[Played]]:
    """A finished run's settings and cases, as results.run_tables and the functions in estimates.py take them; people's
    texts are empty. Functions of the user's own that the settings name are run by those that use them.

    Raises InputError for a folder without a finished run, and for a case's file that is missing or damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    known = {field.name: record[field.name] for field in fields(Settings) if field.name in record}
    given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in known.items()}
    settings = Settings(**given | {"anonymous": False})  # names are as the tables have them
    users = read_table(folder, "users", dtype={"user": str}, keep_default_na=False)
    people = users.groupby(["target", "crowd"])
    cases = []
    for target, number, seed in case_keys(
        settings.target_emotion, settings.num_crowds, settings.num_seeds, settings.seed
    ):
        path = folder / CASES / f"{case_name(target, number, seed)}.npz"
        arrays = load_arrays(path)
        try:
            own = people.get_group((target, number))
            crowd = crowd_without_texts(target, arrays or {}, own["user"].tolist(), own["kind"].tolist())
            cases.append(played_case(settings, Case(crowd, number, seed), arrays or {}))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{path}: missing or damaged ({type(error).__name__})") from None
    return settings, with_other_seeds(cases)


def with_other_seeds(cases: Sequence[Played]) -> list[Played]:
    def same_crowd(a: Case, b: Case) -> bool:
        return (a.crowd.target, a.number) == (b.crowd.target, b.number) and a.seed != b.seed

    return [replace(each, again=tuple(other for other in cases if same_crowd(each.case, other.case))) for each in cases]


def user_names(settings: Settings, crowd: Crowd) -> list[str]:
    if settings.anonymous:
        return [str(number) for number in range(1, len(crowd.people) + 1)]
    return [person.name for person in crowd.people]
