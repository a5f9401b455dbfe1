"""Statistics and tables against scipy and cases worked by hand; figures draw all that the tables hold."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiment.figures import legend_below, new_figure
from experiment.statistics import correlation_interval, mean_interval
from user_grouping_evaluation_sim import plots, tables
from user_grouping_evaluation_sim.main import main
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.tables import COMBINATION, Combination, pearson, rounds_to_converge, spearman
from user_grouping_evaluation_sim.vector_world import Trace


def test_mean_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, (4, 9))
    mean, low, high = mean_interval(values)
    for i, row in enumerate(values):
        expected = stats.t.interval(0.95, len(row) - 1, loc=row.mean(), scale=stats.sem(row))
        np.testing.assert_allclose((low[i], high[i]), expected)
    np.testing.assert_allclose(mean, values.mean(axis=1))
    np.testing.assert_allclose(mean_interval(values.T, axis=0), (mean, low, high))


def test_mean_interval_leaves_out_nan():
    values = np.array([1.0, np.nan, 4, 2])
    np.testing.assert_allclose(mean_interval(values), mean_interval(np.array([1.0, 4, 2])))
    mean, low, high = mean_interval(np.array([[5.0, np.nan], [np.nan, np.nan]]))
    np.testing.assert_array_equal(mean, [5, np.nan])
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_correlation_interval_is_its_literal_simulation():
    """Mean and deviation of z drawn by what Student's theory says of them, and tanh averaged over draws of a normal."""
    values, rng = np.array([0.91, 0.86, np.nan, 0.96, 0.59, -0.1]), np.random.default_rng(0)
    z = np.arctanh(values[np.isfinite(values)])
    drawn = []
    for _ in range(4000):
        deviation = z.std(ddof=1) * np.sqrt(4 / rng.chisquare(4))
        centre = rng.normal(z.mean(), deviation / np.sqrt(5))
        drawn.append(np.tanh(rng.normal(centre, deviation, 400)).mean())
    mean, low, high = correlation_interval(values)
    assert mean == np.nanmean(values)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert correlation_interval(-values) == pytest.approx((-mean, -high, -low), abs=0.01)


@pytest.mark.parametrize("count, tolerance", [(2, 0.06), (3, 0.03), (6, 0.03), (300, 0.03)])
def test_correlation_interval_of_like_units_is_students(count, tolerance):
    """Where tanh is straight."""
    values = 0.3 + 1e-4 * np.random.default_rng(2).normal(size=count)
    mean, low, high = correlation_interval(values)
    _, students_low, students_high = mean_interval(values)
    assert (mean - low, high - mean) == pytest.approx((mean - students_low, students_high - mean), rel=tolerance)


@pytest.mark.parametrize("values", [(-0.2, 0.9), (0.99, 0.3, 0.97)])
def test_correlation_interval_of_few_units_that_lie_apart(values):
    """Deviations many times the units' own: by other pairs, and means over quantiles of the normal distribution."""
    z, count, pairs = np.arctanh(values), len(values), 5000
    rng = np.random.default_rng(3)
    deviation = z.std(ddof=1) * np.sqrt((count - 1) / rng.chisquare(count - 1, (pairs, 1)))
    centre = z.mean() + deviation * rng.normal(size=(pairs, 1)) / np.sqrt(count)
    levels = (np.arange(4000) + 0.5) / 4000
    integrals = np.tanh(centre + deviation * stats.norm.ppf(levels)).mean(axis=1)
    ends = np.quantile(integrals, [0.025, 0.975])
    assert correlation_interval(np.array(values))[1:] == pytest.approx(ends, abs=0.02)


def test_correlation_intervals_cover_where_students_do_not():
    """Six units, most near 1: the mean of tanh over their normal z, by a million draws."""
    rng = np.random.default_rng(1)
    truth = np.tanh(rng.normal(1.6, 0.8, 10**6)).mean()
    drawn = np.tanh(rng.normal(1.6, 0.8, (1000, 6)))
    held, students = (
        np.mean([low <= truth <= high for _, low, high in map(interval, drawn)])
        for interval in (correlation_interval, mean_interval)
    )
    assert students < 0.92 < 0.93 < held < 0.97


def test_correlation_interval_of_few_or_equal_units():
    assert np.isnan(correlation_interval(np.array([np.nan, np.nan]))).all()
    mean, *ends = correlation_interval(np.array([0.4, np.nan]))
    assert mean == 0.4 and np.isnan(ends).all()
    np.testing.assert_allclose(correlation_interval(np.full(3, 0.4)), 0.4)
    for perfect in (np.ones(2), -np.ones(3), np.array([0.9995, 0.9997]), np.array([1.0, 1.0, 0.5])):
        mean, low, high = correlation_interval(perfect)
        assert -1 <= low <= mean <= high <= 1


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 20)), rng.integers(0, 6, (5, 20)).astype(float)  # b with ties
    for row in range(5):
        assert pearson(a, b)[row] == pytest.approx(stats.pearsonr(a[row], b[row]).statistic)
        assert spearman(a, b)[row] == pytest.approx(stats.spearmanr(a[row], b[row]).statistic)
    assert np.isnan(pearson(a[0], np.ones(20)))
    assert np.isnan(spearman(np.ones(20), a[0]))


@pytest.mark.parametrize(
    "distances, rounds",
    [
        ([10, 5, 0, 0, 0], 2),
        ([10, 8, 6, 4, 0], 4),
        ([10, 0.4, 0.6, 0.4, 0], 3),  # leaves the 5 % once more
        ([10, 0.4, 0.4, 0.4, 0], 1),
        ([10, 10, 10, 10, 10], 0),  # never moves
        ([1, 3, 5, 5.1, 5], 2),  # away from the expert: the way counts, not its direction
    ],
)
def test_rounds_to_converge_by_hand(distances, rounds):
    assert rounds_to_converge(np.array([distances], dtype=float)) == [rounds]


def a_cell(grouping, scoring, seed, runs=6, users=5, kernel=2):
    rng = np.random.default_rng(seed)
    return Combination(
        (grouping, "l2", scoring),
        np.tile(np.arange(users), (runs, 1)),
        np.sort(rng.uniform(1, 9, (runs, 4)))[:, ::-1],
        rng.normal(size=(runs, users)),
        rng.uniform(0.1, 0.2, (runs, users)),
        rng.integers(0, 10**6, (runs, users)),
        rng.uniform(0.1, 0.2, (runs, users)),
        rng.integers(1, 10**6, runs),
        rng.uniform(0, 0.9, runs),
        rng.normal(size=(runs, users)),
        rng.uniform(0.01, 0.02, (runs, users)),
        rng.normal(size=(kernel, users)),
        Trace(*[np.zeros(1)] * len(fields(Trace))),
    )


CELLS = [a_cell(g, s, i) for i, (g, s) in enumerate((g, s) for g in ("random", "other") for s in ("m", "a"))]


def test_runs_points_and_rounds_hold_every_run():
    frames = tables.run_tables(CELLS)
    runs, rounds, points = frames["runs"], frames["rounds"], frames["points"]
    assert (len(runs), len(rounds), len(points)) == (4 * 6, 4 * 6 * 4, 4 * 6 * 5)
    cell, row = CELLS[2], runs[(runs["grouping"] == "other") & (runs["scoring"] == "m") & (runs["run"] == 3)].iloc[0]
    assert row["pearson"] == pytest.approx(stats.pearsonr(cell.points[3], cell.shapley[3]).statistic)
    assert row["start_distance"] == cell.distances[3, 0]
    assert row["final_distance"] == cell.distances[3, -1]
    assert row["hull_distance"] == cell.hull[3]
    assert row["shapley_standard_error"] == pytest.approx(cell.standard_errors[3].max() / cell.shapley[3].std())
    mine = (points["grouping"] == "other") & (points["scoring"] == "m") & (points["run"] == 3)
    np.testing.assert_array_equal(points.loc[mine, "points"], cell.points[3])
    np.testing.assert_array_equal(points.loc[mine, "shapley"], cell.shapley[3])
    mine = (rounds["grouping"] == "other") & (rounds["scoring"] == "m") & (rounds["run"] == 3)
    np.testing.assert_array_equal(rounds.loc[mine, "distance"], cell.distances[3])
    np.testing.assert_array_equal(rounds.loc[mine, "round"], range(4))


def test_summary_has_means_and_intervals():
    frames = tables.run_tables(CELLS)
    runs, summary = frames["runs"], frames["summary"]
    chosen = runs[(runs["grouping"] == "random") & (runs["scoring"] == "a")]
    row = summary[(summary["grouping"] == "random") & (summary["scoring"] == "a")].iloc[0]
    regret = (chosen["final_distance"] - chosen["hull_distance"]) / (chosen["start_distance"] - chosen["hull_distance"])
    for name, values in (("final_distance", chosen["final_distance"]), ("regret", regret)):
        low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((values.mean(), low, high))


def test_paired_differences_are_run_by_run():
    frames = tables.run_tables(CELLS)
    paired = frames["paired"]
    row = paired[
        (paired["compared"] == "scoring") & (paired["grouping"] == "other") & (paired["measure"] == "final_distance")
    ].iloc[0]
    difference = CELLS[3].distances[:, -1] - CELLS[2].distances[:, -1]
    low, high = stats.t.interval(0.95, 5, loc=difference.mean(), scale=stats.sem(difference))
    assert (row["alternative"], row["reference"]) == ("a", "m")
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((difference.mean(), low, high))


def test_estimators_compare_the_same_runs():
    frame = tables.run_tables(CELLS)["estimators"]
    row = frame[(frame["grouping"] == "random") & (frame["scoring"] == "m") & (frame["run"] == 1)].iloc[0]
    cell = CELLS[0]
    assert row["pearson"] == pytest.approx(np.corrcoef(cell.points[1], cell.shapley[1])[0, 1])
    assert row["pearson_kernel"] == pytest.approx(np.corrcoef(cell.points[1], cell.kernel[1])[0, 1])
    assert row["kernel_against_shapley"] == pytest.approx(np.corrcoef(cell.kernel[1], cell.shapley[1])[0, 1])


def test_best_shares_of_a_sure_winner():
    def runs(best_final, best_pearson):
        rows = [
            {
                "grouping": grouping,
                "metric": "l2",
                "scoring": "m",
                "run": run,
                "final_distance": (1 if grouping == best_final else 2) + run / 100,
                "pearson": (0.9 if grouping == best_pearson else 0.1) + run / 100,
            }
            for grouping in ("random", "other")
            for run in range(5)
        ]
        return pd.DataFrame(rows)

    settings = {(10, 2): runs("random", "other"), (10, 3): runs("random", "random")}
    settings |= {(25, 2): runs("random", "other"), (25, 3): runs("random", "other")}
    best = tables.best_table(settings, np.random.default_rng(0)).set_index(["measure", "grouping"])
    assert best.loc[("final_distance", "random"), ["best_share", "low", "high"]].tolist() == [1, 1, 1]
    assert best.loc[("final_distance", "other"), "best_share"] == 0
    assert best.loc[("pearson", "other"), "best_share"] == 0.75
    assert best.loc[("pearson", "random"), ["best_share", "low", "high"]].tolist() == [0.25, 0.25, 0.25]
    one_run = {size: runs[runs["run"] == 0] for size, runs in settings.items()}
    best = tables.best_table(one_run, np.random.default_rng(0))
    assert best["best_share"].notna().all() and best[["low", "high"]].isna().all(axis=None)  # one has no interval


def test_best_shares_of_equals_are_uncertain():
    rng = np.random.default_rng(3)
    rows = [
        {"grouping": g, "metric": "l2", "scoring": "m", "run": r, "final_distance": rng.normal(), "pearson": 0.0}
        for g in ("random", "other")
        for r in range(8)
    ]
    for settings in ([(5, 2)], [(5, 1), (5, 2), (5, 3)]):  # of the same crowds: they add nothing
        best = tables.best_table(dict.fromkeys(settings, pd.DataFrame(rows)), rng)
        chosen = best[best["measure"] == "final_distance"]
        assert chosen["best_share"].sum() == 1
        assert (chosen["low"] == 0).all()
        assert (chosen["high"] == 1).all()


def test_nobody_is_best_where_nothing_is_known():
    rng = np.random.default_rng(4)
    known = {"random": [0.2, np.nan, 0.4], "other": [0.9, 0.1, np.nan]}  # means 0.3 and 0.5 of what is known
    rows = [
        {"grouping": g, "metric": "l2", "scoring": "m", "run": r, "final_distance": 1.0, "pearson": value}
        for g, values in known.items()
        for r, value in enumerate(values)
    ]
    runs = pd.DataFrame(rows)
    best = tables.best_table({(5, 2): runs, (5, 1): runs.assign(pearson=np.nan)}, rng)
    shares = best[best["measure"] == "pearson"].set_index("grouping")["best_share"]
    assert shares.to_dict() == {"random": 0, "other": 0.5}
    best = tables.best_table({(5, 1): runs.assign(pearson=np.nan)}, rng)
    assert best["measure"].unique().tolist() == ["final_distance"]


def test_sweep_differences_are_of_their_setting():
    runs = tables.runs_table(CELLS)
    shifted = runs.assign(final_distance=runs["final_distance"] + (runs["grouping"] == "other"))
    frames = tables.sweep_tables({(5, 2): runs, (5, 3): shifted}, np.random.default_rng(0))
    chosen = frames["sweep_paired"].query("compared == 'grouping' and scoring == 'a' and measure == 'final_distance'")
    by_groups = chosen.set_index("num_groups")["difference"]
    assert by_groups[3] - by_groups[2] == pytest.approx(1)
    assert "replication" not in frames  # the study published nothing of these


def test_replication_stands_beside_what_is_published():
    key = ["scoring", "measure", "grouping", "metric"]
    own = [("ranked", "pearson", "random", "dot"), ("ranked", "pearson", "random", "l2")]
    own += [("ranked", "final_distance", "epsilon_greedy", "l2"), ("marginal", "pearson", "random", "dot")]
    best = pd.DataFrame(own, columns=key).assign(best_share=0.5, low=0.4, high=0.6)
    replication = tables.replication_table(best)
    assert replication[key].to_numpy().tolist() == [list(row) for row in own[:3]]
    np.testing.assert_array_equal(replication["published_share"], [0.45, np.nan, 0.6])


# ------------------------------------------------------------------ figures


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


@pytest.mark.parametrize(("columns", "width", "fitting"), [(3, 7.0, 3), (3, 2.6, 1), (2, 4.5, 2)])
def test_a_legend_has_no_more_columns_than_the_figure_has_room_for(columns, width, fitting):
    figure, axes = new_figure(width=width)
    for number in range(4):
        axes[0, 0].plot([0], [0], label=f"a label, number {number}")
    legend_below(figure, axes[0, 0], columns)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert legend._ncols == fitting and box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_published_shares_stand_at_their_combination():
    names = [("random", "l2"), ("random", "dot")]
    best = pd.DataFrame([("ranked", "pearson", *name, 0.5, 0.4, 0.6) for name in names])
    best.columns = ["scoring", "measure", "grouping", "metric", "best_share", "low", "high"]
    figure = plots.best_shares(best.assign(published_share=[np.nan, 0.45]))
    (published,) = (line for line in figure.axes[0].lines if line.get_marker() == "D")
    assert published.get_xydata().tolist() == [[0.45, 1]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["random, l2", "random, dot"]
