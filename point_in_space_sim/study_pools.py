"""When does competition pay? Pools of which a share of the users writes off target, and a pool of real comments.

Six emotions, on three of which no rule and no setting was tried (pride, remorse, surprise); seeds of their own. Each
pool is a run of run.py in the folder runs/ beside the table and the figure, and finished ones are not run again.

    python point_in_space_sim/study_pools.py
    python point_in_space_sim/study_pools.py --real goemotions/test.tsv
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from experiment.errors import InputError, RunFailed
from experiment.figures import new_figure, save_figure
from experiment.files import ROOT
from experiment.tables import write_table
from point_in_space_sim import settings as of_run
from point_in_space_sim.main import main as run
from point_in_space_sim.measures import MEASURES
from point_in_space_sim.plots import GREY, colour_of, marker_of
from point_in_space_sim.pool import Deal
from point_in_space_sim.protocols import PROTOCOLS
from point_in_space_sim.results import QUANTITY, overall, pick, read_table

OFF_TARGET = {"none": 0, "sixth": 2, "third": 4}  # of the twelve users
DEALS: tuple[Deal, ...] = ("user", "comment")
LEVELS = ("single", "chosen", "filter", "oracle", "multi", "multi_plus", "random_pick")
AGAINST = ("single", "chosen", "filter", "oracle", "random_pick", "multi")


@dataclass(frozen=True)
class Settings:
    output_dir: Path = ROOT / "results" / "point_in_space_sim" / "pools"
    """Where pools.csv and the figure go, and the runs."""
    real: str | None = None
    """Also a pool of real comments: a corpus as for run.py, such as GoEmotions' TSV files."""
    emotions: tuple[str, ...] = ("joy", "fear", "gratitude", "pride", "remorse", "surprise")
    """As for run.py."""
    seed: int = 20
    """The first seed."""
    num_seeds: int = 2
    """As for run.py."""
    jobs: int = 2
    """As for run.py."""
    device: str = "auto"
    """As for run.py."""


def pools(settings: Settings) -> dict[str, of_run.Settings]:
    """The runs by the names of their folders."""
    folder = settings.output_dir / "runs"
    common = of_run.Settings(
        emotions=settings.emotions,
        seed=settings.seed,
        num_seeds=settings.num_seeds,
        protocols=("base", *LEVELS),
        jobs=settings.jobs,
        device=settings.device,
    )
    # As many comments for twelve users as without users.
    shipped = replace(common, neighbours=96, num_users=12)
    runs = {
        f"{share}-{deal}": replace(shipped, contamination=off / 12, deal=deal)
        for share, off in OFF_TARGET.items()
        for deal in DEALS
    }
    if settings.real is not None:
        runs["real"] = replace(common, corpus=settings.real)
    return {name: replace(own, output_dir=folder / name) for name, own in runs.items()}


def main(settings: Settings) -> None:
    tables = []
    for name, own in pools(settings).items():
        assert own.output_dir is not None
        run(own)  # says so where it is finished, and refuses what other settings have left there
        summary = read_table(own.output_dir, "summary")
        summary = summary[summary["measure"].isin(list(MEASURES)) & summary["protocol"].isin(["base", *LEVELS])]
        tables.append(summary.assign(pool=name))
    table = pd.concat(tables, ignore_index=True)
    table = table[["pool", "emotion", *QUANTITY, "seeds", "value", "low", "high"]]
    write_table(table, settings.output_dir, "pools")
    save_figure(pools_figure(table), settings.output_dir, "pools")
    print(f"results in {settings.output_dir}: plus selection's mean distance less that of the chosen single model's")
    for name, own in table.groupby("pool", sort=False):
        row = pick(overall(own), "distance", "multi_plus", "chosen").iloc[0]
        print(f"  {name:14}{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")


def pools_figure(table: pd.DataFrame) -> Any:
    """A column a way of dealing; mean distances above, then paired differences of plus selection to the others."""
    means = {str(name): overall(own) for name, own in table.groupby("pool", sort=False)}
    figure, axes = new_figure(3, 2, width=7.4, height=6.6, sharey="row", height_ratios=(3, 3, 3))
    for column, deal in enumerate(DEALS):
        names = {f"{share}-{deal}": label for share, label in zip(OFF_TARGET, ("0", "1/6", "1/3"), strict=True)}
        if deal == "comment" and "real" in means:
            names["real"] = "real\ncomments"
        rows: list[tuple[str, tuple[str, ...], str]] = [("distance", LEVELS, "")]
        rows += [(measure, AGAINST, "multi_plus") for measure in ("distance", "energy")]
        for panel, (measure, protocols, of) in zip(axes[:, column], rows, strict=True):
            for number, protocol in enumerate(protocols):
                said = (of, protocol) if of else (protocol, "")
                found = {i: pick(means[name], measure, *said) for i, name in enumerate(names)}
                at = [i for i, own in found.items() if len(own)]
                value, low, high = np.array([found[i][["value", "low", "high"]].iloc[0] for i in at], float).T
                x = np.array(at) + 0.1 * (number - (len(protocols) - 1) / 2)
                style: Any = {"color": colour_of(protocol), "marker": marker_of(protocol), "markersize": 4}
                label = PROTOCOLS[protocol].short
                panel.errorbar(x, value, yerr=[value - low, high - value], fmt="", ls="", lw=1.1, label=label, **style)
                shares = [i for i in range(len(at)) if at[i] < len(OFF_TARGET)]
                panel.plot(x[shares], value[shares], color=colour_of(protocol), lw=0.7, alpha=0.7)
            panel.set_xticks(range(len(names)), list(names.values()))
            panel.grid(visible=False, axis="x")
            if of:
                panel.axhline(0, color=GREY, lw=0.8)
            if "real" in names:
                panel.axvline(2.5, color=GREY, lw=0.6, ls=":")
        axes[0, column].set_title(f"dealt by {deal}")
        axes[-1, column].set_xlabel("share of the twelve users who write off target")
    axes[0, 0].set_ylabel("mean distance (L2)")
    for panel, measure in zip(axes[1:, 0], ("mean", "energy"), strict=True):
        panel.set_ylabel(f"plus less the other:\n{measure} distance (L2)")
    targets, seeds = table["emotion"].nunique(), table["seeds"].max()
    note = f"means over {targets} emotions, {seeds} seeds; bars: 95 % intervals over emotions; below 0 plus is nearer"
    for axis, place, title in (
        (axes[0, 0], "outside upper center", note),
        (axes[1, 0], "outside lower center", "plus selection less"),
    ):
        own = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        options: Any = {"loc": place, "ncols": 7, "fontsize": 7, "title": title, "title_fontsize": 7}
        figure.legend(list(own.values()), list(own), **options)
    return figure


if __name__ == "__main__":
    # Under the name by which worker processes find it.
    from point_in_space_sim.study_pools import Settings, main

    try:
        main(tyro.cli(Settings, description=__doc__))
    except (InputError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
