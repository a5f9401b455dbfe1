"""What people are paid, and the coordinator's record that it follows from."""

import numpy as np

from crowd_fine_tuning_sim.cases import CASE, COMBINATION, Combination, Played, metric_of, strategies_of, user_names
from crowd_fine_tuning_sim.retraining import values_of
from crowd_fine_tuning_sim.settings import Settings
from user_grouping_evaluation_sim.ledger import Account, Form, paid, replayed, rounds_of
from user_grouping_evaluation_sim.payout import misallocation

LEDGER = Form(
    (*CASE, *COMBINATION),
    (
        *("seed", "crowd", "target_emotion", "num_crowds", "num_seeds", "num_users", "texts_per_user", "kinds"),
        *("num_groups", "num_rounds", "budget", "samples", "error_probability", *COMBINATION),
        *("base_model", "mapper", "crowd_sha256", "code_sha256"),
    ),
)
"""Of this experiment's ledgers."""


def accounts_of(settings: Settings, played: Played) -> dict[Combination, Account]:
    """What the ledger holds of each competition, but with --reference none, which has no audits."""
    if "audited" not in played.retraining:
        return {}
    key, centroid, n = tuple(map(str, played.key.values())), played.case.crowd.centroid, len(played.means)
    names = tuple(map(str, user_names(settings, played.case.crowd)))
    accounts = {}
    for combination, own in played.competitions.items():
        metric = metric_of(combination[1])
        audits, _ = values_of(played.retraining["audited"], centroid, metric)
        (final, base), _ = values_of(np.stack([own["final"], played.retraining["fresh"][0]]), centroid, metric)
        columns = ("labels", "weights", "rewards", "improved", "order", "merged_weights")
        accounts[combination] = Account(
            (*key, *combination),
            names,
            rounds_of(*(own[name] for name in columns)),
            (audits[1 : n + 1] - audits[0])[None],
            audits[n + 1 : n + 2] - audits[0],
            np.array([final - base]),
        )
    return accounts


def pay_of(settings: Settings, played: Played) -> dict[Combination, tuple[np.ndarray, np.ndarray]]:
    """Of each competition, in whole units (payout.UNIT), and its standard errors: (n,) each, NaN where unknown."""
    unknown = np.full(len(played.means), np.nan)
    found = dict.fromkeys(played.competitions, (unknown, unknown))
    for combination, account in accounts_of(settings, played).items():
        _, _, scoring = strategies_of(combination)
        *_, final = replayed(account, scoring, settings.num_rounds)
        found[combination] = paid(account, final, settings.num_rounds, None)
    return found


def misallocated(shares: np.ndarray, shapley: np.ndarray) -> float:
    """See payout.misallocation; NaN where shares or Shapley values are unknown, or nothing is paid. (n,) each."""
    if not (np.isfinite(shares).all() and np.isfinite(shapley).all() and shares.sum() > 0):
        return np.nan
    return float(misallocation(shares[None], shapley[None])[0])
