"""What a case asks of the language models: its competitions, the audits and the retraining, side by side."""

from collections.abc import Callable
from functools import partial

import numpy as np

from crowd_fine_tuning_sim.asking import Ask
from crowd_fine_tuning_sim.cases import Case, Combination, combinations_of
from crowd_fine_tuning_sim.estimates import sampled_reference
from crowd_fine_tuning_sim.retraining import Retrained, all_coalitions, audited_coalitions, retrain, values_of
from crowd_fine_tuning_sim.settings import Settings
from crowd_fine_tuning_sim.text_world import TextWorld
from experiment.run_folder import Arrays
from point_in_space_sim.engine.recipes import Model, Request, Texts, name_of
from user_grouping_evaluation_sim.competition import Rules, compete
from user_grouping_evaluation_sim.ledger import recorded
from user_grouping_evaluation_sim.settings import functions_of, metric_of

REPORTED = 4  # samples, each of as many texts as value a coalition, of the few models that are compared at the end


def plays_of(settings: Settings, case: Case) -> dict[str, Callable[[Ask], Arrays]]:
    """By the names under which their arrays are saved: the competitions by their numbers, then the retraining."""
    plays: dict[str, Callable[[Ask], Arrays]] = {
        f"{case.name}-{number}": partial(play_competition, settings, case, combination)
        for number, combination in enumerate(combinations_of(settings))
    }
    return plays | {f"{case.name}-retraining": partial(play_retraining, settings, case)}


def play_competition(settings: Settings, case: Case, combination: Combination, ask: Ask) -> Arrays:
    """One competition. points (n,); of the rounds what ledger.recorded gives, (T, ...);
    judged (T + 1, 28), the mean vector of a fresh sample of the model before each round and at the end; final
    (REPORTED samples, 28), and its texts."""
    grouping, metric, scoring = functions_of(*combination)
    crowd, streams = case.crowd, case.streams
    pool = tuple(text for person in crowd.people for text in person.texts + person.later)

    def contributed(round_number: int) -> tuple[Texts, ...]:
        return crowd.texts_at(round_number / settings.num_rounds)

    world = TextWorld(contributed, pool, crowd.centroid, metric, settings.budget, streams, ask)
    rules = Rules(settings.num_groups, settings.num_rounds, settings.error_probability)
    rng = np.random.default_rng(streams("rounds"))
    steps = list(compete(world, [None], (1, len(crowd.people)), grouping, scoring, rules, rng))
    final: Model = steps[-1].model[0]
    kept = () if final is None else (f"{case.name}-{'-'.join(combination)}".replace(":", "."),)
    found = ask([Request(final, reports_of(case), kept)])
    drawn = [found[name_of(final), report] for report in reports_of(case)]
    rows = [recorded(step) for step in steps]
    return {
        **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        "points": steps[-1].standing.points[0],
        "judged": np.array([*world.judged, drawn[0].vectors.mean(axis=0)]),
        "final": np.concatenate([sample.vectors for sample in drawn]),
        "texts": np.array([text for sample in drawn for text in sample.texts], dtype=str),
    }


def reports_of(case: Case) -> tuple[int, ...]:
    return tuple(case.streams("report", number) for number in range(REPORTED))


def play_retraining(settings: Settings, case: Case, ask: Ask) -> Arrays:
    """The coalitions' samples, and fresh ones of the models that the competitions are compared with.

    coalitions (m, n), vectors (m, samples, 28); audited (n + 2 or 2 n + 2, samples, 28), of audited_coalitions tuned
    and sampled anew, so that neither pay nor leaving one out is checked by what it was made of, but with --reference
    none; compared (k, n), the coalitions of `fresh` (k, REPORTED samples, 28): nobody, everybody, and by each metric
    the best single person by the audits and the best retrained coalition.
    """
    texts = [person.texts for person in case.crowd.people]
    n, tuning, valuation = len(texts), case.streams("retraining"), (case.streams("valuation"),)
    everyone = np.ones((1, n), dtype=bool)
    audited = {}
    if settings.reference != "none":
        at_the_end, coalitions = case.crowd.texts_at(1.0), audited_coalitions(n, settings.reference == "exact")
        drawn = retrain(at_the_end, coalitions, case.streams("audit tuning"), (case.streams("audit"),), ask)
        audited = {"audited": drawn.vectors}
    if settings.reference == "exact":
        found = retrain(texts, all_coalitions(n), tuning, valuation, ask)
    else:
        found = retrain(texts, np.zeros((1, n), dtype=bool), tuning, valuation, ask)
        if settings.reference == "sampled":
            asked = [found]

            def vectors_of(coalitions: np.ndarray) -> np.ndarray:
                drawn = retrain(texts, coalitions, tuning, valuation, ask)
                new = coalitions.any(axis=1)  # the empty one is there
                asked.append(Retrained(coalitions[new], drawn.vectors[new]))
                return drawn.vectors

            sampled_reference(settings, case, vectors_of, found.vectors[0])
            found = Retrained(
                np.concatenate([each.coalitions for each in asked]), np.concatenate([each.vectors for each in asked])
            )
    compared = [~everyone[0], everyone[0]]
    for name in settings.metric if audited else ():
        metric = metric_of(name)
        values, _ = values_of(found.vectors, case.crowd.centroid, metric)
        alone, _ = values_of(audited["audited"][1 : n + 1], case.crowd.centroid, metric)
        compared += [np.arange(n) == alone.argmax(), found.coalitions[values.argmax()]]
    fresh = retrain(texts, np.array(compared), tuning, reports_of(case), ask)
    return {
        "coalitions": found.coalitions,
        "vectors": found.vectors,
        **audited,
        "compared": fresh.coalitions,
        "fresh": fresh.vectors,
    }
