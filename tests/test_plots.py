"""Figures: what they draw is all that the tables hold, and a run that allows fewer of them still ends."""

import numpy as np
import pandas as pd
import pytest

from user_grouping_evaluation_sim import plots
from user_grouping_evaluation_sim.main import main
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.tables import COMBINATION

TINY = {"num_runs": 2, "num_rounds": 3, "kernel_runs": 0, "scoring": ("ranked",), "metric": ("l2",), "jobs": 1}


@pytest.mark.parametrize("case", ["one dimension", "one user"])
def test_a_crowd_without_a_plane(case, tmp_path):
    settings = {"num_users": 1, "num_groups": 1}
    if case == "one dimension":
        column = np.random.default_rng(0).uniform(0, 5, 8)
        pd.DataFrame({"who": [f"p{i}" for i in range(8)], "a": column}).to_csv(tmp_path / "a.csv", index=False)
        settings = {"num_users": 4, "num_groups": 2, "preferences": tmp_path / "a.csv"}
    main(Settings(output_dir=tmp_path / "run", **settings, **TINY))
    drawn = {path.stem for path in (tmp_path / "run").glob("*.png")}
    assert "distance_by_grouping_ranked" in drawn
    assert "subset_influence" not in drawn
    assert ("points_against_shapley_ranked" in drawn) == (case == "one dimension")
    assert (tmp_path / "run" / "report.html").exists()


def some_runs(scorings=("ranked", "attributed"), runs=3):
    rng = np.random.default_rng(1)
    names = [(g, m, s) for g in ("random", "other") for m in ("l2", "dot") for s in scorings]
    frame = pd.DataFrame([(*name, run) for name in names for run in range(runs)], columns=[*COMBINATION, "run"])
    numbers = {name: rng.uniform(0.1, 0.9, len(frame)) for name in ("pearson", "pearson_kernel", "final_distance")}
    return frame.assign(**numbers, start_distance=2.0, hull_distance=0.05)


def test_no_user_is_lost_and_panels_share_their_colours():
    rng = np.random.default_rng(2)
    runs = some_runs(("ranked",))
    points = runs[[*COMBINATION, "run"]].merge(pd.DataFrame({"user": range(60)}), how="cross")
    points["shapley"], points["points"] = rng.normal(size=len(points)), rng.normal(size=len(points))
    points.loc[points["user"] == 0, "points"] = 40.0  # beyond 4 standard deviations of its run
    figure = plots.points_against_shapley(points, runs)
    cells = [ax.collections[0] for ax in figure.axes[:4]]
    assert [cell.get_array().sum() for cell in cells] == [3 * 60] * 4
    assert len({(cell.norm.vmin, cell.norm.vmax) for cell in cells}) == 1
    assert cells[0].norm.vmax == max(cell.get_array().max() for cell in cells)


def test_estimates_of_a_run_are_joined():
    runs = some_runs()
    figure = plots.estimator_noise(runs)
    lines = [segment for ax in figure.axes for group in ax.collections[::3] for segment in group.get_segments()]
    joined = sorted((segment[0, 0], segment[1, 0]) for segment in lines)
    assert joined == sorted(zip(runs["pearson_kernel"], runs["pearson"], strict=True))


def test_agreement_has_one_legend_entry_a_factor():
    figure = plots.agreement_against_regret(some_runs())
    assert [ax.get_title() for ax in figure.axes] == ["l2", "dot"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["random grouping", "other grouping", "ranked points", "attributed points"]


def test_published_shares_stand_at_their_combination():
    names = [("random", "l2"), ("random", "dot")]
    best = pd.DataFrame([("ranked", "pearson", *name, 0.5, 0.4, 0.6) for name in names])
    best.columns = ["scoring", "measure", "grouping", "metric", "best_share", "low", "high"]
    figure = plots.best_shares(best.assign(published_share=[np.nan, 0.45]))
    (published,) = (line for line in figure.axes[0].lines if line.get_marker() == "D")
    assert published.get_xydata().tolist() == [[0.45, 1]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["random, l2", "random, dot"]
