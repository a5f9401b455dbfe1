"""Chooses how variants are tuned and sampled, by successive narrowing on two emotions, and checks it on others.

Each stage varies one or two settings around the best so far. A trial tunes the base model on the 33 comments nearest
to an emotion's target (what a variant of the first generation gets) and samples 50 comments. Of the settings whose
comments are fit to read, the one with the least mean distance to the centroid is kept; of those within one standard
error of it, the quickest. Fit to read: at most 5 % are empty or cut off, at most 10 % repeat a training comment word
for word, and word pairs are at least three quarters as varied as in the same number of training comments.

    python point_in_space_sim/study_hyperparameters.py
"""

import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from experiment.errors import InputError
from experiment.figures import COLOURS, MARKERS, new_figure, save_figure
from experiment.files import ROOT, replace_atomically
from experiment.parallel import parallel_map
from point_in_space_sim.corpus import load_corpus
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import load_base_model
from point_in_space_sim.engine.fine_tuning import tune
from point_in_space_sim.engine.sampling import distinct_2, sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import load_mapper, map_texts
from point_in_space_sim.target import distances_to, emotion_target, find_neighbourhood

CHOSEN_ON = ("joy", "nervousness")
CHECKED_ON = ("gratitude", "sadness", "fear", "love")
BROKEN, COPIED, VARIETY = 0.05, 0.10, 0.75  # at most, at most, at least
START = {
    "learning_rate": 2e-3,
    "epochs": 5,
    "layers": 10,
    "rank": 16,
    "batch_size": 11,
    "temperature": 1.0,
    "top_p": 0.95,
}
STAGES: tuple[tuple[str, dict[str, tuple]], ...] = (
    ("learning rate and epochs", {"learning_rate": (1e-3, 2e-3, 4e-3), "epochs": (3, 5)}),
    ("layers", {"layers": (5, 10, 20)}),
    ("learning rate again", {"learning_rate": (0.5, 1.0, 2.0)}),  # times the best so far: it depends on the layers
    ("rank", {"rank": (4, 16, 64)}),
    ("comments a step", {"batch_size": (8, 11, 17)}),
    ("temperature and nucleus", {"temperature": (0.7, 0.85, 1.0), "top_p": (0.9, 1.0)}),
)


@dataclass(frozen=True)
class Settings:
    output_dir: Path = ROOT / "results" / "point_in_space_sim" / "hyperparameters"
    """Where trials.csv, choice.csv and the figure go."""
    mapper: str = "embedded"
    """As for run.py."""
    base_model: str = "smollm2-135m"
    """As for run.py."""
    seeds: int = 2
    """Trials of each setting and emotion; trials already in trials.csv are not run again."""
    comments: int = 33
    """How many nearest comments a trial tunes on."""
    samples: int = 50
    """Comments sampled a trial."""
    jobs: int = 2
    """Trials at once; one thread each where there are several."""


BEFORE = {"base_model": "smollm2-135m", "comments": 33, "samples": 50}
"""What trials of before November 30, 2026, which do not say it, were made with."""


@dataclass(frozen=True)
class Trial:
    """One tuning and sampling. epochs 0 is the untuned base model."""

    stage: str
    emotion: str
    seed: int
    setting: dict[str, float]
    run: Settings

    @property
    def tuning(self) -> TuningSettings:
        known = TuningSettings.__dataclass_fields__
        given: dict[str, Any] = {name: value for name, value in self.setting.items() if name in known}
        return TuningSettings(**given)

    @property
    def sampling(self) -> SamplingSettings:
        known = SamplingSettings.__dataclass_fields__
        given: dict[str, Any] = {name: value for name, value in self.setting.items() if name in known}
        return SamplingSettings(**given)


@cache
def loaded(base_model: str, mapper: str) -> tuple[Any, ...]:
    """(base model, mapper, corpus, its vectors), once a process."""
    corpus, loaded_mapper = load_corpus(), load_mapper(mapper)
    vectors = map_texts(loaded_mapper, corpus.texts, cache_folder() / "vectors")
    return load_base_model(base_model), loaded_mapper, corpus, vectors


@lru_cache(maxsize=16)  # the stage that varies sampling alone tunes nothing anew
def tuned(base_model: str, mapper: str, emotion: str, comments: int, tuning: TuningSettings, seed: int) -> Any:
    """(adapter, seconds it took, training texts, neighbourhood)."""
    base, _, corpus, vectors = loaded(base_model, mapper)
    neighbourhood = find_neighbourhood(emotion_target(emotion, vectors), vectors, 100)
    texts = [corpus.texts[i] for i in neighbourhood.members[:comments]]
    begin = time.perf_counter()
    adapter = tune(base, texts, tuning, seed) if tuning.epochs else None
    return adapter, time.perf_counter() - begin, texts, neighbourhood


def run_trial(trial: Trial) -> dict[str, Any]:
    """A row of trials.csv."""
    run = trial.run
    tune_seed, sample_seed = (int(s) for s in np.random.SeedSequence(trial.seed).generate_state(2))
    adapter, tuning_seconds, texts, neighbourhood = tuned(
        run.base_model, run.mapper, trial.emotion, run.comments, trial.tuning, tune_seed
    )
    base, mapper, *_ = loaded(run.base_model, run.mapper)
    begin = time.perf_counter()
    samples = sample_comments(base, run.samples, sample_seed, trial.sampling, adapter)
    sampling_seconds = time.perf_counter() - begin
    distances = distances_to(neighbourhood.centroid, mapper(samples.texts))
    known = {text.lower() for text in texts}
    # Of equally many texts, since word pairs repeat more the more texts there are.
    compared = min(len(texts), len(samples.texts))
    return {
        "stage": trial.stage,
        "emotion": trial.emotion,
        "seed": trial.seed,
        **trial.setting,
        "mean_distance": distances.mean(),
        "variance_of_mean": distances.var(ddof=1) / len(distances),
        "neighbourhood_distance": neighbourhood.distances.mean(),
        "broken": samples.broken,
        "copied": float(np.mean([text.lower() in known for text in samples.texts])),
        "distinct_2": distinct_2(samples.texts),
        "variety": distinct_2(samples.texts[:compared]) / distinct_2(texts[:compared]),
        "tuning_seconds": tuning_seconds,
        "sampling_seconds": sampling_seconds,
        "example": samples.texts[0],
        "mapper": mapper.name,
        **{name: getattr(run, name) for name in BEFORE},
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def by_setting(trials: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: means over emotions and seeds, and the standard error of the mean distance."""
    table = trials.groupby(list(START), sort=False, as_index=False).agg(
        mean_distance=("mean_distance", "mean"),
        standard_error=("variance_of_mean", lambda v: v.sum() ** 0.5 / len(v)),
        broken=("broken", "mean"),
        copied=("copied", "mean"),
        distinct_2=("distinct_2", "mean"),
        variety=("variety", "mean"),
        tuning_seconds=("tuning_seconds", "mean"),
        sampling_seconds=("sampling_seconds", "mean"),
    )
    table["readable"] = (table.broken <= BROKEN) & (table.copied <= COPIED) & (table.variety >= VARIETY)
    return table


def choose(table: pd.DataFrame) -> dict[str, Any]:
    """The setting that the rule above picks; the least copied one where none is fit to read."""
    readable = table[table.readable]
    if readable.empty:
        row = table.loc[table.copied.idxmin()]
    else:
        best = readable.loc[readable.mean_distance.idxmin()]
        close = readable[readable.mean_distance <= best.mean_distance + best.standard_error]
        row = close.loc[(close.tuning_seconds + close.sampling_seconds).idxmin()]
    return {name: type(value)(row[name]) for name, value in START.items()}


def main(settings: Settings) -> None:
    path = settings.output_dir / "trials.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        held = pd.read_csv(path)
        held = held.assign(
            **{name: held[name].fillna(value) if name in held else value for name, value in BEFORE.items()}
        )
        own = {name: getattr(settings, name) for name in BEFORE}
        own["mapper"] = loaded(settings.base_model, settings.mapper)[1].name
        others = [f"{name} {value}" for name in own for value in held[name].unique() if value != own[name]]
        if others:
            raise InputError(f"{path} holds trials with {', '.join(others)}: remove it, or choose another --output-dir")
        rows = held.to_dict("records")

    def run_all(stage: str, candidates: list[dict[str, Any]], emotions: tuple[str, ...]) -> pd.DataFrame:
        """The stage's trials; those already in trials.csv are not run again."""
        wanted = [
            Trial(stage, emotion, seed, candidate, settings)
            for candidate in candidates
            for emotion in emotions
            for seed in range(settings.seeds)
        ]
        done = {key(row) for row in rows}
        new = [trial for trial in wanted if key(asdict(trial) | trial.setting) not in done]
        with closing(parallel_map(run_trial, new, jobs=settings.jobs, description=stage)) as results:
            for row in results:
                rows.append(row)
                write(pd.DataFrame(rows), path)
        keys = {key(asdict(trial) | trial.setting) for trial in wanted}
        return pd.DataFrame([row for row in rows if key(row) in keys])

    best: dict[str, Any] = dict(START)
    chosen = []
    for stage, options in STAGES:
        candidates = [dict(best)]
        for name, values in options.items():
            factor = best[name] if stage.endswith("again") else 1
            candidates = [{**candidate, name: factor * value} for candidate in candidates for value in values]
        table = by_setting(run_all(stage, candidates, CHOSEN_ON))
        best = choose(table)
        print(f"\n{stage}\n{table.round(4).to_string(index=False)}\n-> {best}", flush=True)
        chosen.append({"stage": stage, **best})
    print("\nthe choice, and the untuned base model, on every emotion")
    final = run_all("check", [best, {**best, "epochs": 0}], (*CHOSEN_ON, *CHECKED_ON))
    checked = final.groupby(["epochs", "emotion"], sort=False, as_index=False).mean(numeric_only=True)
    print(
        checked[
            [
                "emotion",
                "epochs",
                "mean_distance",
                "neighbourhood_distance",
                "broken",
                "copied",
                "distinct_2",
                "variety",
                "tuning_seconds",
                "sampling_seconds",
            ]
        ]
        .round(3)
        .to_string(index=False)
    )
    write(pd.DataFrame(chosen), settings.output_dir / "choice.csv")
    draw(pd.DataFrame(rows), best, settings.output_dir)


def key(row: dict[str, Any]) -> tuple:
    return row["emotion"], *(float(f"{row[name]:.6g}") for name in ("seed", *START))


def write(table: pd.DataFrame, path: Path) -> None:
    with replace_atomically(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def draw(trials: pd.DataFrame, best: dict[str, Any], folder: Path) -> None:
    """Left: every setting's distance against its variety; the choice is ringed. Right: the choice on every emotion."""
    figure, axes = new_figure(1, 2, width=7.5, height=3.6, width_ratios=(3, 2))
    left, right = axes[0]
    for i, (stage, _) in enumerate(STAGES):
        table = by_setting(trials[trials.stage == stage])
        left.errorbar(
            table.variety,
            table.mean_distance,
            yerr=table.standard_error,
            fmt=MARKERS[i],
            ms=4,
            color=COLOURS[i],
            label=stage,
            lw=0.8,
        )
    chosen = by_setting(trials[trials.emotion.isin(CHOSEN_ON) & (trials[list(best)] == pd.Series(best)).all(axis=1)])
    left.plot(chosen.variety, chosen.mean_distance, "o", ms=12, mfc="none", mec="black", label="choice")
    left.axvline(VARIETY, color="grey", lw=0.8, ls="--", label="least variety")
    left.set(
        xlabel="word pairs' variety (training comments: 1)",
        ylabel="mean distance to the centroid",
        title=f"mean of {' and '.join(CHOSEN_ON)}; bars: one standard error",
    )
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.12, 1.0))

    checked = trials[(trials[[n for n in best if n != "epochs"]] == pd.Series(best).drop("epochs")).all(axis=1)]
    for offset, (epochs, label) in enumerate(((0, "base model"), (best["epochs"], "tuned on 33"))):
        table = checked[checked.epochs == epochs].groupby("emotion").mean_distance.mean()
        emotions = [e for e in (*CHOSEN_ON, *CHECKED_ON) if e in table.index]
        right.plot(table[emotions], range(len(emotions)), MARKERS[offset], color=COLOURS[offset], label=label)
    own = trials.groupby("emotion").neighbourhood_distance.mean()[emotions]
    right.plot(own, range(len(emotions)), "|", ms=12, color="black", label="the neighbourhood itself")
    right.set(
        yticks=range(len(emotions)),
        yticklabels=emotions,
        xlabel="mean distance to the centroid",
        xlim=(0, None),
        ylim=(-0.5, len(emotions) + 1.2),
    )
    right.set_title("the choice, on each emotion")
    right.annotate(f"mapper {trials.mapper.iloc[0]}", (1, -0.2), xycoords="axes fraction", ha="right", fontsize=6)
    right.legend(fontsize=7, loc="upper left")
    save_figure(figure, folder, "hyperparameters")


if __name__ == "__main__":
    # Under the name by which worker processes find it.
    from point_in_space_sim.study_hyperparameters import Settings, main

    try:
        main(tyro.cli(Settings, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
