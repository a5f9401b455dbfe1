"""What people are paid, and the coordinator's record that it follows from."""

from dataclasses import dataclass, replace

import numpy as np

from crowd_fine_tuning_sim.cases import CASE, COMBINATION, Combination, Played, user_names
from crowd_fine_tuning_sim.retraining import values_of
from crowd_fine_tuning_sim.settings import Settings
from user_grouping_evaluation_sim.ledger import Account, Form, paid, replayed, rounds_of
from user_grouping_evaluation_sim.payout import UNIT, misallocation, shares
from user_grouping_evaluation_sim.settings import functions_of, metric_of

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


@dataclass(frozen=True)
class Pay:
    """(n,) each, NaN where unknown. units: whole, see payout.UNIT. errors: their standard errors. shares: of a budget,
    also where the competition has earned none: who would be paid less often must not look better for it."""

    units: np.ndarray
    errors: np.ndarray
    shares: np.ndarray


def pay_of(settings: Settings, played: Played) -> dict[Combination, Pay]:
    """Of each competition."""
    unknown = np.full(len(played.means), np.nan)
    found = dict.fromkeys(played.competitions, Pay(unknown, unknown, unknown))
    for combination, account in accounts_of(settings, played).items():
        _, _, scoring = functions_of(*combination)
        *_, final = replayed(account, scoring, settings.num_rounds)
        one = replace(account, gained=np.ones(1))
        found[combination] = Pay(
            *paid(account, final, settings.num_rounds, None), paid(one, final, settings.num_rounds, None)[0] * UNIT
        )
    return found


def misallocated(values: np.ndarray, shapley: np.ndarray) -> float:
    """payout.misallocation of what is shared out by values, equally where none is above 0; NaN where values or Shapley
    values are unknown, or none of the latter is above 0. (n,) each."""
    if not (np.isfinite(values).all() and np.isfinite(shapley).all()):
        return np.nan
    return float(misallocation(shares(values[None], np.ones((1, len(values)))), shapley[None])[0])
