"""Who does not play along, with texts: what a turncoat, a copyist and a spammer are paid, and a sybil.

Mean text vectors play experiment 2's competition: no model is tuned. The first three are people of simulated crowds
beside their honest twins. The sybil is one of real people, who opens more accounts with the same texts, from which
words are left out at random; people of whom one holds near-duplicates of half of the other's texts are taken for one
(crowds.taken_for). That rule was fixed beforehand.

Run: python crowd_fine_tuning_sim/study_strategies.py
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from crowd_fine_tuning_sim.crowds import (
    Crowd,
    Mapper,
    Person,
    eligible,
    load_source,
    real_crowd,
    simulated_crowd,
    taken_for,
)
from crowd_fine_tuning_sim.estimates import conduct_of
from experiment.command_line import StudySettings, run_script
from experiment.figures import COLOURS, LINES, MARKERS, legend_below, new_figure, save_figure
from experiment.files import ROOT
from experiment.statistics import mean_interval
from experiment.tables import write_table
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.mapper import load_mapper, map_texts
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.incentives import ACCOUNTS, ratio_interval, split_by
from user_grouping_evaluation_sim.metrics import l2
from user_grouping_evaluation_sim.preferences import Crowd as VectorCrowd
from user_grouping_evaluation_sim.scoring import SCORINGS, attributed
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import pearson
from user_grouping_evaluation_sim.vector_world import always, simulate

RESULTS = ROOT / "results" / "crowd_fine_tuning_sim" / "strategies"
TARGETS = ("curiosity", "admiration", "amusement", "love")
RULES = Rules(num_groups=2, num_rounds=12, error_probability=0.0)
KINDS = ("on", "half", "random", "off", "on")  # of the people beside the strategist
SPAMMED = 4  # whose first text a spammer repeats: the one off target
SHIPPED_TARGETS = ("joy", "fear", "gratitude")
SCORED = ("marginal", "ranked", "attributed")
LEFT_OUT = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # of a copy's words
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
SHARE = 0.5


@dataclass(frozen=True)
class Settings(StudySettings):
    seed: int = 7000
    num_runs: int = 24
    """Crowds, their targets in turn."""
    crowd: str = "chitchat"
    """As of run.py."""
    user_column: str = "user"
    text_column: str = "text"
    num_users: int = 6
    texts_per_user: int = 12


def with_copies(people: Sequence[Person], left_out: float, rng: np.random.Generator) -> list[Person]:
    """The people, and more accounts of the first, from whose texts each word is left out with this probability."""
    copies = []
    for account in range(1, ACCOUNTS):
        words = [text.split() for text in people[0].texts]
        kept = [[word for word in own if rng.random() >= left_out] or own[:1] for own in words]
        copies.append(replace(people[0], name=f"copy {account}", texts=tuple(" ".join(own) for own in kept)))
    return [*people, *copies]


def paid(crowd: Crowd, means: np.ndarray, first: np.ndarray, start: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """(accounts,): attributed pay of a competition among those who are told apart, each one's shared evenly."""
    people = np.unique(first)
    world = VectorCrowd(people[None], means[people][None], crowd.centroid[None], start[None])
    found = simulate(world, GROUPINGS["random"], l2, attributed, RULES, np.random.default_rng(seed))
    pay = np.zeros(len(means))
    pay[people] = found.pay[0]
    return split_by(first, pay)


def merged_table(people: Sequence[Person], settings: Settings) -> pd.DataFrame:
    """merged.csv: the share of honest people who are taken for another one, by the share of texts that it takes."""
    rng = np.random.default_rng((settings.seed, 0))
    held = settings.texts_per_user
    drawn = [replace(p, texts=tuple(p.texts[i] for i in rng.choice(len(p.texts), held, False))) for p in people]
    rows = [[share, len(drawn), held, np.mean(taken_for(drawn, share) != np.arange(len(drawn)))] for share in SHARES]
    return pd.DataFrame(rows, columns=["share", "people", "texts", "merged"])


def main(settings: Settings) -> None:
    folder = settings.output_dir or RESULTS
    source = load_source(settings.crowd, settings.user_column, settings.text_column)
    mapper = load_mapper("embedded")

    def mapped(texts: Sequence[str]) -> np.ndarray:
        return map_texts(mapper, texts, cache_folder=cache_folder() / "vectors")

    start = mapped(list(dict.fromkeys(text for person in source.people for text in person.texts))[:500]).mean(axis=0)
    honest, lost = np.zeros(settings.num_runs), np.zeros(settings.num_runs)
    found, apart, together = np.zeros((3, len(LEFT_OUT), settings.num_runs))
    for run in tqdm(range(settings.num_runs), desc="crowds", dynamic_ncols=True):
        rng = np.random.default_rng((settings.seed, 1, run))
        target = TARGETS[run % len(TARGETS)]
        crowd = real_crowd(source, target, settings.num_users, settings.texts_per_user, 100, mapped, rng)
        means, n, seed = crowd.means_at(0.0), settings.num_users, (settings.seed, 2, run)
        shapley = shapley_values(means, crowd.centroid, l2, method="exact").values
        pay = paid(crowd, means, np.arange(n), start, seed)
        honest[run] = pay[0]
        by_quotient = paid(crowd, means, taken_for(crowd.people, SHARE), start, seed)
        lost[run] = pearson(pay, shapley) - pearson(by_quotient, shapley)
        for row, left_out in enumerate(LEFT_OUT):
            accounts = with_copies(crowd.people, left_out, rng)
            extra = [mapped(person.texts).astype(np.float64).mean(axis=0) for person in accounts[n:]]
            first, everybody = taken_for(accounts, SHARE), np.vstack([means, *extra])
            own = [0, *range(n, len(accounts))]
            found[row, run] = (first[n:] == first[0]).mean()
            apart[row, run] = paid(crowd, everybody, np.arange(len(accounts)), start, seed)[own].sum()
            together[row, run] = paid(crowd, everybody, first, start, seed)[own].sum()
    tables = {"merged": merged_table(eligible(source, settings.texts_per_user), settings)}
    tables["copies"] = copies_table(honest, found, apart, together)
    tables["strategies"] = strategies_table(settings, mapped, start)
    r_lost = [SHARE, *map(float, mean_interval(lost))]
    tables["honest"] = pd.DataFrame([r_lost], columns=["share", "lost", "low", "high"])
    for name, table in tables.items():
        write_table(table, folder, name, "%.6g")
    save_figure(copies_figure(tables["copies"], tables["merged"]), folder, "copies")
    print(f"results: {folder}")


def strategies_table(settings: Settings, mapped: Mapper, start: np.ndarray) -> pd.DataFrame:
    """strategies.csv: the first person's pay over that of the honest twin in the same crowd and rounds, with 95 %
    intervals over crowds; shapley_vs_twin: the same of Shapley values, of strategies that stay the same."""
    source = load_source("shipped")
    pay: dict[tuple[str, str], list[float]] = {}
    values: dict[str, list[float]] = {}
    for run in range(settings.num_runs):
        crowd, turned = (
            simulated_crowd(
                source,
                SHIPPED_TARGETS[run % len(SHIPPED_TARGETS)],
                (first, *KINDS),
                settings.texts_per_user,
                100,
                mapped,
                np.random.default_rng((settings.seed, 3, run)),
            )
            for first in ("on", "turncoat")
        )
        honest = crowd.means_at(0.0)
        played = {"honest": honest[0], "copyist": honest[1], "spammer": crowd.vectors[SPAMMED][0]}
        plays = {name: always(np.vstack([own, honest[1:]])[None]) for name, own in played.items()}
        plays["turncoat"] = conduct_of(turned, RULES.num_rounds)
        world = VectorCrowd(np.arange(len(honest))[None], honest[None], crowd.centroid[None], start[None])
        for name, conduct in plays.items():
            for scoring in SCORED:
                rng = np.random.default_rng((settings.seed, 4, run))
                found = simulate(world, GROUPINGS["random"], l2, SCORINGS[scoring], RULES, rng, conduct=conduct)
                pay.setdefault((name, scoring), []).append(float(found.pay[0, 0]))
            shapley = shapley_values(conduct.vectors(0)[0], crowd.centroid, l2, method="exact").values
            values.setdefault(name, []).append(float(shapley[0]) if name != "turncoat" else np.nan)
    rows = []
    for (name, scoring), own in pay.items():
        ratio = ratio_interval(np.array(own), np.array(pay["honest", scoring]))
        rows.append([name, scoring, *ratio, ratio_interval(np.array(values[name]), np.array(values["honest"]))[0]])
    return pd.DataFrame(rows, columns=["strategy", "scoring", "pay_vs_twin", "low", "high", "shapley_vs_twin"])


def copies_table(honest: np.ndarray, found: np.ndarray, apart: np.ndarray, together: np.ndarray) -> pd.DataFrame:
    """copies.csv: what all accounts of a sybil are paid over its honest twin, with 95 % intervals over crowds: each
    taken for a person of its own, and by the quotient. honest: (runs,), the others (LEFT_OUT, runs)."""
    rows = []
    for row, left_out in enumerate(LEFT_OUT):
        alone, by_quotient = ratio_interval(apart[row], honest), ratio_interval(together[row], honest)
        rows.append([left_out, found[row].mean(), *alone, *by_quotient])
    names = [f"{what}{end}" for what in ("gain", "quotient_gain") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["left_out", "found", *names])


def copies_figure(copies: pd.DataFrame, merged: pd.DataFrame) -> Figure:
    """A sybil's gain and the copies that are found, by words left out, and the honest people who are merged."""
    figure, axes = new_figure(1, 3, width=7.4, height=3.0)
    left, middle, right = axes[0]
    told = "accounts taken for one person"
    for number, (column, label) in enumerate((("gain", "each account by itself"), ("quotient_gain", told))):
        ends: Any = [copies[column] - copies[f"{column}_low"], copies[f"{column}_high"] - copies[column]]
        style: Any = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number], "ms": 4}
        left.errorbar(copies["left_out"], copies[column], yerr=ends, label=label, **style)
    left.axhline(1, color="black", linewidth=0.6, linestyle=":")
    left.set_ylim(0, None)
    left.set_xlabel("words left out (share)")
    left.set_ylabel("pay of 5 accounts\nover the honest twin's")
    middle.plot(copies["left_out"], 100 * copies["found"], color="black", marker="o", ms=4)
    middle.set_xlabel("words left out (share)")
    middle.set_ylabel("copies that are found (%)")
    middle.set_ylim(0, None)
    right.plot(merged["share"], 100 * merged["merged"], color="black", marker="o", ms=4)
    right.set_xlabel("texts with near-duplicates\nthat it takes (share)")
    right.set_ylabel("honest people\ntaken for another (%)")
    right.set_ylim(0, None)
    legend_below(figure, left, 2)
    return figure


if __name__ == "__main__":
    sys.exit(run_script("crowd_fine_tuning_sim.study_strategies", Settings, {"default": {}}, __doc__))
