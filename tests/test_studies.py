"""What studies make of runs, by hand; the studies themselves are run by hand."""

import numpy as np
import pandas as pd

from experiment.statistics import correlation_interval, mean_interval
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.study_pay import Truth, merging
from user_grouping_evaluation_sim.study_protocol import agreement


def test_a_sybil_is_found_within_the_tolerance_and_paid_once():
    rng = np.random.default_rng(0)
    users, expert = 5 * rng.uniform(size=(2, 8, 6)), 5 * rng.uniform(size=(2, 6))
    users[:, 0] = expert + 0.3  # who has copies is paid
    crowd = Crowd(np.tile(np.arange(8), (2, 1)), users, expert, np.zeros((2, 6)))
    values = [shapley_values(*pair, "l2", method="exact").values for pair in zip(users, expert, strict=True)]
    truth = Truth(crowd, {"l2": np.array(values)}, np.zeros(2))
    for case, found in (((0.0, 0.0), 1), ((0.5, 0.49), 1), ((0.5, 0.51), 0)):
        row = merging(truth, 0, case)
        assert (row["tolerance"], row["distance"], row["found"], row["merged"]) == (*case, found, 0), case
        assert (row["sybil_gain"] == 1) == bool(found)


def test_intervals_of_agreement_are_of_what_is_measured():
    values = {"pearson": [0.7, 0.9, 0.95], "reliability": [0.9, 0.99, 0.999]}
    key = {"num_users": 8, "scoring": "ranked", "of": "points", "against": "static"}
    rows = [key | {"run": i, "measure": m, "value": v} for m, own in values.items() for i, v in enumerate(own)]
    table = agreement(pd.DataFrame(rows)).set_index("measure")[["mean", "low", "high"]]
    np.testing.assert_allclose(table.loc["pearson"], correlation_interval(np.array(values["pearson"])))
    mean, low, high = mean_interval(np.array(values["reliability"]))
    assert high > 1
    np.testing.assert_allclose(table.loc["reliability"], [mean, low, 1.0])
