"""Experiment 3: the text world against a literal transcription of the loop, the retraining game against definitions,
plays side by side, and the command line end to end on tiny models."""

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.text import Text
from scipy.stats import pearsonr, spearmanr

from crowd_fine_tuning_sim import main
from crowd_fine_tuning_sim.asking import play_together
from crowd_fine_tuning_sim.cases import CASE, COMBINATION, Case, played_case
from crowd_fine_tuning_sim.crowds import Crowd, Person
from crowd_fine_tuning_sim.estimates import ESTIMATES, simulated
from crowd_fine_tuning_sim.pay import misallocated, pay_of
from crowd_fine_tuning_sim.plays import plays_of
from crowd_fine_tuning_sim.plots import agreement_figure, people_figure, progress_figure
from crowd_fine_tuning_sim.report_page import people
from crowd_fine_tuning_sim.results import (
    CORRELATIONS,
    correlations,
    finals_table,
    interval_over_crowds,
    run_tables,
    summary_table,
)
from crowd_fine_tuning_sim.retraining import (
    all_coalitions,
    exact_shapley,
    retrain,
    sampled_shapley,
    static_game,
    unsampled_noise,
    values_of,
)
from crowd_fine_tuning_sim.settings import Settings
from crowd_fine_tuning_sim.text_world import Streams, TextWorld, draw_texts
from crowd_fine_tuning_sim.verification import check_agreement, check_shapley
from experiment.compare import main as compare
from experiment.errors import InputError
from experiment.run_folder import load_arrays, output_hashes, save_arrays
from experiment.statistics import correlation_interval
from experiment.verify import verify_run
from point_in_space_sim.engine.base_model import dtype_name, native_dtype
from point_in_space_sim.engine.recipes import Request, Sampled, Tuned, name_of
from tests.tiny_models import save_tiny_world
from user_grouping_evaluation_sim.competition import NONE, Rules, Shares, compete
from user_grouping_evaluation_sim.grouping import random
from user_grouping_evaluation_sim.metrics import l2
from user_grouping_evaluation_sim.payout import allotted
from user_grouping_evaluation_sim.scoring import attributed, marginal, ranked

ROOT = Path(__file__).resolve().parents[1]
NATIVE = dtype_name(native_dtype(torch.device("cpu")))
PEOPLE = [tuple(f"text {i} of person {k}" for i in range(4)) for k in range(5)]
TURNED = [tuple(f"other text {i} of person 0" for i in range(4)), *PEOPLE[1:]]


def contributed(round_number):
    """The first person turns coat in round 3."""
    return PEOPLE if round_number < 3 else TURNED


def vector_of(text):
    """A fake mapper: a point that is the text's own."""
    return np.random.default_rng(list(text.encode())).normal(size=28)


def write(model, sample, count=6):
    """A fake engine: what a model writes lies around the mean of the texts that it and its ancestors were tuned on."""
    texts = []
    while model is not None:
        texts += list(model.texts)
        model = model.start
    centre = np.mean([vector_of(text) for text in texts], axis=0) if texts else np.full(28, 2.0)
    return centre + 0.05 * np.random.default_rng([sample % 2**32, len(texts)]).normal(size=(count, 28))


def fake_ask(requests):
    return {
        (name_of(request.model), sample): Sampled(("",) * 6, write(request.model, sample), 0.0)
        for request in requests
        for sample in request.samples
    }


@pytest.mark.parametrize("scoring", [marginal, ranked, attributed])
def test_the_loop_is_its_literal_transcription(scoring):
    """Groups, texts by largest remainder, candidates from the incumbent, fresh samples, plus selection."""
    centroid, streams, budget, rounds = vector_of("aim"), Streams(3, "crowd"), 7, 8
    pool = sum(PEOPLE, TURNED[0])
    world = TextWorld(contributed, pool, centroid, l2, budget, streams, fake_ask)
    rules = Rules(2, rounds, 0.0)
    steps = list(compete(world, [None], (1, 5), random, scoring, rules, np.random.default_rng(1)))

    model, judged, merged_rounds = None, [], 0
    for t, step in enumerate(steps):
        drawing = np.random.default_rng(streams("texts", t))
        turn = np.random.default_rng(streams("remainders", t)).permutation(5).tolist()
        merged = step.round.merged_weights
        rows = [(step.round.labels[0] == g) * step.round.weights[0] for g in range(2)]
        rows += [] if merged is None else [merged[0]]
        merged_rounds += merged is not None
        candidates = []
        for weights in rows:
            exact = [budget * w / weights.sum() for w in weights]
            counts = [int(e + 1e-9) for e in exact]
            while sum(counts) < budget:
                left = [e - c for e, c in zip(exact, counts, strict=True)]
                counts[max(turn, key=lambda person: left[person])] += 1
            texts = []
            for own, count in zip(contributed(t), counts, strict=True):
                order = drawing.permutation(len(own)).tolist()
                texts += [own[order[i % len(own)]] for i in range(count)]
            candidates.append(Tuned(tuple(texts), model, streams("tuning", t), pool))
        sample = streams("selection", t)
        own = -np.linalg.norm(write(model, sample).mean(axis=0) - centroid)
        gains = [-np.linalg.norm(write(c, sample).mean(axis=0) - centroid) - own for c in candidates]
        judged.append(write(model, sample).mean(axis=0))
        np.testing.assert_allclose(step.round.rewards[0], gains[:2])
        best = int(np.argmax(gains))
        assert step.taken[0] == (best if gains[best] > 0 else NONE)
        if gains[best] > 0:
            model = candidates[best]
        assert name_of(step.model[0]) == name_of(model)
    np.testing.assert_allclose(world.judged, judged)
    assert model is not None and (merged_rounds > 0) == (scoring is attributed)


@given(arrays(float, st.integers(1, 8), elements=st.floats(0, 1)), st.integers(1, 50))
def test_allotted_shares(weights, budget):
    if weights.sum() < 1e-6:
        return
    counts = allotted(np.asarray(budget), weights)
    exact = budget * weights / weights.sum()
    assert counts.sum() == budget and (np.abs(counts - exact) < 1 + 1e-6).all() and (counts[weights == 0] == 0).all()


def test_a_persons_texts_are_all_drawn_before_one_comes_again():
    drawn = draw_texts(PEOPLE, np.array([1.0, 0, 0, 0, 0]), 6, np.arange(5), np.random.default_rng(0))
    assert set(drawn[:4]) == set(PEOPLE[0]) and drawn[4:] == drawn[:2]


def test_equal_weights_give_equally_many_texts_over_the_rounds():
    """Five people, 13 texts a round: three of them give one more, whoever is listed first."""
    world = TextWorld(lambda t: PEOPLE, sum(PEOPLE, ()), vector_of("aim"), l2, 13, Streams(0, "crowd"), fake_ask)
    shares = Shares(1, np.zeros((1, 5), dtype=int), np.full((1, 5), 0.2), None)
    owner = {text: person for person, own in enumerate(PEOPLE) for text in own}
    counts = np.zeros(5)
    for t in range(200):
        (model,) = world.propose([None], shares, t).models
        counts += np.bincount([owner[text] for text in model.texts], minlength=5)
    # Of one more or none at 3/5, 200 times: a standard deviation of 7 texts.
    assert counts.sum() == 200 * 13 and np.abs(counts - 520).max() < 4 * 7


def test_plays_side_by_side_get_what_they_ask_for_and_errors_end_them():
    def fulfil(orders):
        waiting.extend(orders)
        owner, request = waiting.pop(0)  # one at a time
        return [((owner, request), fake_ask([request]))]

    def play(number, ask):
        model = Tuned(PEOPLE[number], None, number)
        drawn = ask([Request(model, (1,)), Request(None, (2,))])
        return set(drawn) | set(ask([Request(model, (3,))]))

    waiting = []
    plays = {f"play {number}": lambda ask, number=number: play(number, ask) for number in range(3)}
    found = play_together(plays, fulfil)
    for number in range(3):
        name = Tuned(PEOPLE[number], None, number).name
        assert found[f"play {number}"] == {(name, 1), ("base", 2), (name, 3)}
    assert play_together({}, fulfil) == {}

    def broken(ask):
        ask([Request(None, (1,))])
        raise InputError("the metric fails")

    with pytest.raises(InputError, match="the metric fails"):
        play_together(plays | {"broken": broken}, fulfil)

    def broken_at_once(ask):
        raise InputError("the grouping fails")

    with pytest.raises(InputError, match="the grouping fails"):  # and nobody waits for an answer for ever
        play_together(plays | {"broken": broken_at_once}, fulfil)

    def failing(orders):
        raise MemoryError("too little")

    with pytest.raises(MemoryError):
        play_together(plays, failing)


def test_exact_shapley_is_the_mean_over_all_orders_of_joining():
    n = 4
    coalitions = all_coalitions(n)
    rng = np.random.default_rng(0)
    values, variances = rng.normal(size=2**n), rng.uniform(size=2**n)
    index = {coalition.tobytes(): i for i, coalition in enumerate(coalitions)}
    weights = np.zeros((n, 2**n))
    for order in permutations(range(n)):
        inside = np.zeros(n, dtype=bool)
        for player in order:
            weights[player, index[inside.tobytes()]] -= 1 / 24
            inside[player] = True
            weights[player, index[inside.tobytes()]] += 1 / 24
    found, errors = exact_shapley(values, variances, n)
    np.testing.assert_allclose(found, weights @ values)
    np.testing.assert_allclose(errors, np.sqrt(weights**2 @ variances))


def test_the_retraining_game_is_of_the_models_of_coalitions():
    coalitions = all_coalitions(3)
    found = retrain(PEOPLE[:3], coalitions, 5, (9,), fake_ask)
    centroid = vector_of("aim")
    values, variances = values_of(found.vectors, centroid, l2)
    for coalition, value in zip(coalitions, values, strict=True):
        texts = tuple(text for own, inside in zip(PEOPLE, coalition, strict=False) if inside for text in own)
        model = Tuned(texts, None, 5, tuple(sum(PEOPLE[:3], ()))) if texts else None
        assert value == pytest.approx(-np.linalg.norm(write(model, 9).mean(axis=0) - centroid))
    # A mean's own value is linear: its jackknife variance is that of the mean.
    dot_variances = values_of(found.vectors, centroid, lambda a, b: (a * b).sum(-1))[1]
    expected = (found.vectors @ centroid).var(axis=1, ddof=1) / found.vectors.shape[1]
    np.testing.assert_allclose(dot_variances, expected)
    assert (variances > 0).all()


def test_copies_and_idle_people_are_valued_as_they_must_be():
    """A copyist and its original get the same; who changes nothing gets nothing."""
    rng = np.random.default_rng(2)
    points = rng.normal(size=28)

    def value(coalition):
        return 1.5 * bool(coalition[0] or coalition[1]) + 0.5 * coalition[2]

    coalitions = all_coalitions(4)
    values, _ = exact_shapley(np.array([value(c) for c in coalitions], dtype=float), np.zeros(16), 4)
    np.testing.assert_allclose(values, [0.75, 0.75, 0.5, 0.0], atol=1e-12)
    means = np.stack([points, points, -points])
    game = static_game(means, np.zeros(28), points, l2)
    static = exact_shapley(game(all_coalitions(3)), np.zeros(8), 3)[0]
    assert static[0] == pytest.approx(static[1]) and static[2] < static[0]


def test_the_static_game_helps_the_sampled_reference():
    """A game near its static one: at the same number of coalitions the error is a small part of that without it."""
    n, rng = 8, np.random.default_rng(0)
    means, centroid, base = rng.normal(size=(n, 28)), np.zeros(28), rng.normal(size=28) * 2
    static = static_game(means, base, centroid, l2)
    noise = rng.normal(scale=0.02, size=2**n)

    def game(coalitions):
        return static(coalitions) + noise[coalitions @ (1 << np.arange(n))]

    truth = exact_shapley(game(all_coalitions(n)), np.zeros(2**n), n)[0]

    def error(control):
        found = [sampled_shapley(game, control, n, 64, seed) for seed in range(20)]
        assert all(estimate.evaluations <= 64 for estimate in found)
        return np.sqrt(np.mean([(estimate.values - truth) ** 2 for estimate in found]))

    assert error(static) < 0.5 * error(lambda coalitions: np.zeros(len(coalitions)))


def test_intervals_of_the_sampled_reference_cover_the_values_without_the_judges_noise():
    """Half of what the static game leaves unexplained is the judge's noise, more of it on larger coalitions."""
    n, numbers = 8, 1 << np.arange(8)
    everything = all_coalitions(n)
    rng = np.random.default_rng(5)
    means, centroid, base = rng.normal(size=(n, 28)), np.zeros(28), rng.normal(size=28) * 2
    static = static_game(means, base, centroid, l2)(everything)
    free = static + rng.normal(scale=0.1, size=2**n)
    variances = 0.1**2 * (0.5 + everything.sum(axis=1) / n)
    truth, exact_errors = exact_shapley(free, variances, n)
    np.testing.assert_allclose(unsampled_noise(everything, variances), exact_errors**2)

    def covered(retrainings, seed):
        noisy = free + np.random.default_rng(seed).normal(size=2**n) * np.sqrt(variances)
        control = np.where(everything.any(axis=1), static, noisy)  # nobody's value is the same in both games
        asked = []

        def game(coalitions):
            asked.append(coalitions)
            return noisy[coalitions @ numbers]

        found = sampled_shapley(game, lambda coalitions: control[coalitions @ numbers], n, retrainings, seed)
        coalitions = np.concatenate(asked)
        errors = np.sqrt(found.standard_errors**2 + unsampled_noise(coalitions, variances[coalitions @ numbers]))
        return np.abs(found.values - truth) <= 1.96 * errors

    for retrainings in (32, 64, 128):
        assert 0.9 <= np.mean([covered(retrainings, seed) for seed in range(100)]) <= 0.99


def test_people_who_lie_together_are_told_apart_in_their_figure():
    """Eight people on all but one place: their numbers do not lie over each other; the list names each."""
    names = ["a name that is longer than there is room for it", "$x_1$", *(f"user {i}" for i in range(3, 9))]
    rng = np.random.default_rng(0)
    centroid = rng.dirichlet(np.ones(28))
    means = centroid + rng.normal(scale=1e-3, size=(8, 28))
    played = SimpleNamespace(
        means=means,
        base=rng.dirichlet(np.ones(28)),
        case=SimpleNamespace(crowd=SimpleNamespace(centroid=centroid)),
        competitions={"one": {"judged": rng.dirichlet(np.ones(28), 1)}},
        retraining={"fresh": rng.dirichlet(np.ones(28), (2, 5))},
        key={"target": "joy", "crowd": 1, "seed": 0},
    )
    points = pd.DataFrame({**played.key, "user": names, "shapley": np.linspace(-0.2, 0.15, 8)})
    figure = people_figure(played, points, pd.DataFrame({**played.key, "user": names, "kind": ["on", "off"] * 4}))
    figure.draw_without_rendering()
    numbers = figure.axes[0].texts
    assert [text.get_text() for text in numbers] == [str(number) for number in range(1, 9)]
    # Of an annotation the extent holds its line, too.
    boxes = [Text.get_window_extent(text) for text in numbers]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    axes = figure.axes[0].get_window_extent()
    assert all(not legend.get_window_extent().overlaps(axes) for legend in figure.legends)
    listed = [text.get_text() for text in figure.legends[1].get_texts()]
    assert listed[0] == "1 a name that is longer than … (on): −0.200" and listed[1].startswith("2 $x_1$ (off)")


HONEST = tuple(Person(f"p{k}", "on", own) for k, own in enumerate(PEOPLE))


def played_by(ask, settings, number=0, people=HONEST):
    """A case of PEOPLE, or of others, by a fake engine."""
    near = np.stack([vector_of(f"near {i}") for i in range(4)])
    vectors, later = (
        tuple(np.array([vector_of(text) for text in own]).reshape(-1, 28) for own in texts)
        for texts in ([person.texts for person in people], [person.later for person in people])
    )
    case = Case(Crowd(people, "joy", near, (), vectors, later), number, 0)
    arrays = {
        f"{owner.removeprefix(case.name + '-')}/{name}": array
        for owner, play in plays_of(settings, case).items()
        for name, array in play(ask).items()
    }
    return played_case(settings, case, arrays | {"in_run/values": np.arange(5.0)})


FAKED = Settings(num_users=5, num_rounds=5, budget=6, samples=6)


def test_who_turns_coat_is_paid_but_has_no_value_by_retraining():
    """Coalitions are retrained on what people hold at first: so nothing agrees or disagrees with it."""
    people = (Person("p0", "turncoat", PEOPLE[0], TURNED[0]), *HONEST[1:])
    tables = run_tables(FAKED, [played_by(fake_ask, FAKED, people=people)])
    points = tables["points"]
    assert (points["shapley"].isna() == (points["user"] == "p0")).all() and points["pay"].notna().all()
    assert tables["agreement"][[*CORRELATIONS, "misallocation"]].isna().all(axis=None)
    assert (tables["summary"].query("quantity == 'misallocation'")["crowds"] == 0).all()
    assert agreement_figure(points, tables["estimates"], tables["users"])
    assert check_shapley(points, tables["coalitions"], tables["users"]) == []
    assert check_shapley(points.fillna({"shapley": 0.0}), tables["coalitions"], tables["users"]) != []


def test_shares_of_pay_are_the_same_where_nothing_was_earned():
    played = played_by(fake_ask, FAKED)
    near, far = (
        pay_of(FAKED, replace(played, competitions={k: v | {"final": end} for k, v in played.competitions.items()}))
        for end in (0 * played.retraining["fresh"][0] + played.case.crowd.centroid, played.retraining["fresh"][0] + 100)
    )
    for key, lost in far.items():
        assert near[key].units.sum() > 0 and (lost.units == 0).all()
        assert np.array_equal(near[key].shares, lost.shares) and lost.shares.sum() == pytest.approx(1)
        np.testing.assert_allclose(near[key].units / near[key].units.sum(), lost.shares, atol=1e-4)
    assert misallocated(np.array([-1.0, -2.0]), np.array([3.0, 1.0])) == 0.25  # as shared out equally


def test_what_one_is_worth_alone_is_of_a_model_of_ones_own():
    played = played_by(fake_ask, FAKED)
    audited, centroid = played.retraining["audited"].mean(axis=1), played.case.crowd.centroid
    near = [-math.dist(mean, centroid) for mean in audited]
    expected = [value - near[0] for value in near[1:6]]
    assert ESTIMATES["alone"][0](FAKED, played, "l2") == pytest.approx(expected)
    without = replace(played, retraining={k: v for k, v in played.retraining.items() if k != "audited"})
    assert np.isnan(ESTIMATES["alone"][0](FAKED, without, "l2")).all()


def test_what_ones_texts_are_worth_without_a_model():
    """A person's mean vector alone; of experiment 2's attributed points what is beyond the point at the start."""
    played = played_by(fake_ask, FAKED)
    centroid, base = played.case.crowd.centroid, played.retraining["vectors"][0].mean(axis=0)
    expected = [math.dist(base, centroid) - math.dist(own.mean(axis=0), centroid) for own in played.case.crowd.vectors]
    assert ESTIMATES["static_alone"][0](FAKED, played, "l2") == pytest.approx(expected)
    points = simulated(FAKED, played, ("random", "l2", "attributed")).points[0]
    assert np.array_equal(ESTIMATES["vector"][0](FAKED, played, "l2"), points - 1)


def test_agreement_within_kinds_is_of_what_kinds_do_not_say():
    """Kinds differ by 10; of three people on target and two off, each pair of deviations is written out."""
    kinds = ["on", "off", "on", "half", "on", "off"]
    a, b = np.array([10, 0, 11, 5, 12, 2]), np.array([20.0, 3, 22, 9, 21, 1])
    above = [[-1, -1, 0, 0, 1, 1], [-1, 1, 1, 0, 0, -1]]
    assert correlations(a, b, kinds)[2] == pytest.approx(np.corrcoef(above)[0, 1])
    assert correlations(a, b, kinds)[:2] == pytest.approx([pearsonr(a, b)[0], spearmanr(a, b)[0]])
    assert np.isnan(correlations(a, b, ["real"] * 6)[2]) and np.isnan(correlations(a, b, [*"abcdef"])[2])
    assert np.isnan(correlations(a, np.ones(6), kinds)).all()
    alike = np.array([10.1, 3, 10.1, 7, 10.1, 3])  # within kinds; means of them are off by rounding
    assert np.isnan(correlations(alike, b, kinds)[2])


def test_a_changed_agreement_is_found():
    kinds = ("on", "on", "on", "off", "off")
    people = tuple(replace(person, kind=kind) for person, kind in zip(HONEST, kinds, strict=True))
    tables = run_tables(FAKED, [played_by(fake_ask, FAKED, people=people)])
    assert check_agreement(tables) == [] and tables["agreement"]["within_kinds"].notna().any()
    for column in (*CORRELATIONS, "misallocation"):
        changed = tables["agreement"].copy()
        changed.loc[0, column] += 1e-6
        (line,) = check_agreement(tables | {"agreement": changed})
        assert line.startswith("agreement.csv: ")


def test_copied_texts_are_those_that_somebody_holds():
    played = played_by(fake_ask, FAKED)
    crowd, new = played.case.crowd, np.full((4, 28), 0.5)
    like, changed = crowd.vectors[1][:1] + 1e-6, crowd.vectors[2][:1] + 2e-3
    final = np.concatenate([like, crowd.vectors[0][:1], crowd.vectors[0][:1], changed, new])
    own = {key: arrays | {"final": final} for key, arrays in played.competitions.items()}
    finals = finals_table(FAKED, replace(played, competitions=own)).query("model == 'competition'")
    assert (finals["copied"] == 3 / 8).all() and (finals["distinct"] == 4 / 8).all()


def test_the_readme_shows_how_to_try_an_estimator(monkeypatch, capsys):
    """On committed cases: the code as it stands there; its estimate is that of own mean vectors but for its unit."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "ESTIMATES" in block]
    try:
        exec(code, shown := {})
    finally:
        ESTIMATES.pop("mine", None)
    agreement = shown["agreement"]
    by_estimate = agreement[agreement["what"] != "points"].pivot(index=CASE, columns="what", values="spearman")
    np.testing.assert_allclose(by_estimate["mine"], by_estimate["static_alone"], atol=1e-9)
    assert "mine" in capsys.readouterr().out


def test_noise_alone_does_not_agree_with_the_reference():
    """What people are paid, worth alone, and leaving one out are of other models and samples than the reference."""

    def noise(requests):
        made = [(name_of(request.model), sample) for request in requests for sample in request.samples]
        vectors = {key: np.random.default_rng(list(repr(key).encode())).normal(size=(6, 28)) for key in made}
        return {key: Sampled(("",) * 6, own, 0.0) for key, own in vectors.items()}

    settings = replace(FAKED, scoring=("ranked",), num_rounds=1)
    tables = run_tables(settings, [played_by(noise, settings, number) for number in range(60)])
    for name in ("leave_one_out", "alone"):
        own = tables["agreement"].set_index("what").loc[name, "pearson"]
        assert len(own) == 60 and abs(own.mean()) < 4 * own.std() / 60**0.5 < 0.3  # 0.6 by the reference's own samples


def test_more_scorings_than_colours_are_drawn():
    rows = [("joy", 1, 0, "random", "l2", f"s{k}", w, 0, 1.0) for k in range(9) for w in ("text", "vector")]
    progress_figure(pd.DataFrame(rows, columns=[*CASE, *COMBINATION, "world", "round", "distance"]))


def test_bands_are_over_crowds_and_not_over_their_seeds():
    """Two crowds whose means over seeds are 1 and 3: mean 2, half-width t(0.975, 1) sd / sqrt(2) = 12.706."""
    levels = {(1, 0): 0.5, (1, 1): 1.5, (2, 0): 2.0, (2, 1): 4.0}
    rows = [
        ("joy", crowd, seed, "random", "l2", "ranked", world, t, level)
        for (crowd, seed), level in levels.items()
        for world in ("text", "vector")
        for t in range(2)
    ]
    figure = progress_figure(pd.DataFrame(rows, columns=[*CASE, *COMBINATION, "world", "round", "distance"]))
    (panel,) = figure.axes
    (band,) = panel.collections
    height = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([height.min(), height.max()], [2 - 12.7062, 2 + 12.7062], atol=1e-3)
    assert all((line.get_ydata() == 2).all() for line in panel.lines)
    assert "4 repetitions" in figure.legends[0].get_title().get_text()


def test_the_summary_counts_crowds_with_a_value_and_pairs_pay_with_equal_pay():
    """Three crowds, two seeds: the third crowd has no correlation; pay differs from equal pay by 0.1 and 0.12."""
    rows = []
    for crowd, r, less in ((1, 0.2, 0.1), (2, 0.6, 0.12), (3, np.nan, np.nan)):
        for seed, equal in ((0, 0.5), (1, 0.7)):
            case = ["joy", crowd, seed, "l2"]
            rows.append([*case, "points", "random", "ranked", r + seed / 10, r, r, equal - less, 24])
            rows.append([*case, "points", "random", "marginal", r + seed / 10 - less, r, r, equal, 24])
            rows.append([*case, "static", "", "", r + seed / 10 + 2 * less, r, r, equal, 0])
            rows.append([*case, "equal", "", "", np.nan, np.nan, np.nan, equal, 0])
    columns = [*CASE, "metric", "what", "grouping", "scoring", *CORRELATIONS, "misallocation", "models"]
    ended = []
    for crowd, value in ((1, 0.3), (2, 0.5)):
        for seed, copied in ((0, 0.25), (1, 0.75)):
            case = ["joy", crowd, seed, "l2"]
            ended.append([*case, "competition", "random", "ranked", value, 0.3, 0.5, copied])
            ended.append([*case, "everybody", "", "", 0.25, 0.3, 0.5, 0.125])
    of_finals = [*CASE, "metric", "model", "grouping", "scoring", "value", "distance", "distinct", "copied"]
    summary = summary_table(pd.DataFrame(rows, columns=columns), pd.DataFrame(ended, columns=of_finals))
    summary = summary[summary["scoring"] != "marginal"].set_index(["what", "quantity"])
    of_points = summary.loc["points"]
    assert of_points.loc["copied", "value"] == 0.5 and of_points.loc["copied - everybody", "value"] == 0.375
    assert of_points.loc["value - everybody", "value"] == pytest.approx(0.15)
    assert of_points.loc["pearson - marginal", "value"] == pytest.approx(0.11)
    assert "misallocation - alone" not in of_points.index  # of what is not there
    assert of_points.loc["pearson - static", ["value", "crowds"]].tolist() == pytest.approx([-0.22, 2])
    assert of_points.loc["pearson", "crowds"] == 2 and of_points.loc["models", "crowds"] == 3
    assert of_points.loc["pearson", "value"] == pytest.approx((0.25 + 0.65) / 2)
    through_z = correlation_interval(np.array([0.25, 0.65]))
    assert of_points.loc["pearson", ["value", "low", "high"]].tolist() == pytest.approx(through_z)
    pairs = of_points.loc["misallocation - equal"]
    assert pairs["value"] == pytest.approx(-0.11) and pairs["high"] == pytest.approx(-0.11 + 0.127062, abs=1e-5)


def test_intervals_end_where_a_quantity_cannot_be():
    """Student's over two crowds: 12.7 times half their difference on either side."""
    far = np.array([0.1, 0.9])
    assert interval_over_crowds("misallocation", far) == (0.5, 0.0, 1.0)
    assert interval_over_crowds("misallocation - equal", far) == (0.5, -1.0, 1.0)
    assert interval_over_crowds("value - base", far) == pytest.approx((0.5, 0.5 - 5.08248, 0.5 + 5.08248), abs=1e-4)
    assert np.isnan(interval_over_crowds("misallocation", far[:1])[1:]).all()


def test_the_error_of_a_mean_over_seeds_is_that_of_a_mean():
    rows = [("joy", 1, seed, "u", "l2", "random", "ranked", 1.0, 0.5, error, 0.4) for seed, error in ((0, 3), (1, 4))]
    columns = [*CASE, "user", "metric", "grouping", "scoring", "points", "shapley", "standard_error", "static_shapley"]
    users = pd.DataFrame([("joy", 1, "u", "on", 12, 0.3, 0)])
    users.columns = ["target", "crowd", "user", "kind", "texts", "distance", "near_duplicates"]
    table = people({"points": pd.DataFrame(rows, columns=columns), "users": users})
    assert table.rows[0][table.columns.index("standard error")] == pytest.approx(2.5)


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("crowd"))


def arguments(world, output, *more):
    options = {
        "--crowd": world / "people.csv",
        "--user-column": "who",
        "--text-column": "said",
        "--base-model": world / "llama",
        "--mapper": world / "roberta",
        "--num-users": 3,
        "--texts-per-user": 3,
        "--neighbours": 4,
        "--num-rounds": 2,
        "--budget": 3,
        "--samples": 3,
        "--epochs": 1,
        "--layers": 2,
        "--rank": 2,
        "--max-new-tokens": 6,
        "--jobs": 1,
        "--output-dir": output,
    }
    given = [str(part) for option in options.items() for part in option]
    return [*given, *map(str, more)]


@pytest.fixture(scope="module")
def call(warm, world):
    def called(output, *more, check=0, figures=False):
        """(output, errors)"""
        environment = {"XDG_CACHE_HOME": world / "cache"}
        given = arguments(world, output, *more)
        code, said, errors = warm.call("crowd_fine_tuning_sim", given, world, environment, figures=figures)
        assert code == check, errors[-2000:]
        return said, errors

    return called


def cases(folder):
    return sorted((folder / "cases").glob("*.npz"))


def tables(folder):
    return {path.name: path.read_bytes() for path in [*folder.glob("*.csv"), *folder.glob("adapters/**/*.safetensors")]}


@pytest.fixture(scope="module")
def run(world, call):
    call(world / "run", "--num-seeds", 2, figures=True)
    return world / "run"


@pytest.fixture(scope="module")
def one_seed(world, call):
    call(world / "one_seed")
    return world / "one_seed"


def test_files_of_a_run_and_its_verification(run):
    for name in "users rounds coalitions points summary estimates progress finals agreement reliability ledger".split():
        assert (run / f"{name}.csv").exists(), name
    for name in ("agreement", "coalitions", "progress", "people"):
        assert (run / f"{name}.png").stat().st_size > 5000
    coalitions = pd.read_csv(run / "coalitions.csv", dtype={"coalition": str})
    assert len(coalitions) == 2 * 8 and set(coalitions["coalition"].str.len()) == {3}
    assert len(pd.read_csv(run / "points.csv")) == 2 * 3 * 3
    assert any((run / "adapters").glob("*/adapter_config.json"))
    finals = pd.read_csv(run / "finals.csv").query("model == 'competition' and seed == 0 and scoring == 'marginal'")
    with np.load(run / "cases" / "joy-crowd-1-seed-0.npz") as case:
        texts = case["0/texts"]
    assert finals["distinct"].item() == len(set(texts)) / len(texts)
    assert finals["copied"].item() == 0  # a tiny model writes nothing that people say
    record = json.loads((run / "run.json").read_text())
    assert record["crowd"] == "people.csv" and "answer_in_words" in record
    assert verify_run(run) == ([], [])
    reliability = pd.read_csv(run / "reliability.csv")
    assert reliability.groupby("seed")["source"].agg(list).tolist() == [["samples", "texts", "seeds"]] * 2
    assert reliability["at"].tolist() == [1, 1, 1] * 2
    assert "Telling people apart" in (run / "report.html").read_text()


def test_the_other_seed_is_an_estimate_like_others(run):
    points = pd.read_csv(run / "points.csv").query("scoring == 'ranked'").pivot(index="user", columns="seed")
    again = pd.read_csv(run / "estimates.csv").query("estimate == 'other_seeds'").pivot(index="user", columns="seed")
    np.testing.assert_array_equal(again["value"][[1, 0]], points["shapley"][[0, 1]])
    agreed = pd.read_csv(run / "agreement.csv").query("what == 'other_seeds'")
    r = np.corrcoef(points["shapley"].T)[0, 1]
    np.testing.assert_allclose(agreed["pearson"], r, rtol=1e-9)
    assert (agreed["models"] == 8).all() and "retraining, other seeds" in (run / "report.html").read_text()


def test_a_changed_coalition_is_found(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    table = pd.read_csv(copy / "coalitions.csv", dtype={"coalition": str})
    table.loc[3, "value"] += 1e-6
    table.to_csv(copy / "coalitions.csv", index=False)
    differences, _ = verify_run(copy)
    assert any("shapley is not that of coalitions.csv" in line for line in differences)


def test_a_changed_pay_or_ledger_is_found(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    table = pd.read_csv(copy / "points.csv")
    assert table["pay"].notna().all() and (table["pay"] >= 0).all()
    for (scoring, seed), own in table.groupby(["scoring", "seed"]):
        finals = pd.read_csv(copy / "finals.csv").query(f"seed == {seed}").set_index("model")["value"]
        last = pd.read_csv(copy / "finals.csv").query(f"seed == {seed} and scoring == '{scoring}'")["value"].item()
        assert own["pay"].sum() == max(0, round((last - finals["base"]) * 1e6))
    table.loc[2, "pay"] += 1
    table.to_csv(copy / "points.csv", index=False)
    who = "points.csv: row 4: joy, crowd 1, seed 0, random, l2, marginal, "
    assert any(line.startswith(who) and "by ledger.csv" in line for line in verify_run(copy)[0])
    path = copy / "ledger.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(",candidate,2,", ",candidate,3,", 1), encoding="utf-8")
    assert any("(SHA-256 differs)" in line for line in verify_run(copy)[0])


@pytest.mark.parametrize("column", ["predicted", "observed", "needed"])
def test_a_changed_reliability_is_found(run, tmp_path, column):
    copy = shutil.copytree(run, tmp_path / "copy")
    table = pd.read_csv(copy / "reliability.csv")
    table.loc[2, column] = 0.123  # of seeds
    table.to_csv(copy / "reliability.csv", index=False)
    differences, _ = verify_run(copy)
    assert any(f"seeds: {column} is not what other tables give" in line for line in differences)


def test_seeds_are_added_to_a_finished_run_and_nothing_else_is(call, run, one_seed, tmp_path):
    folder = shutil.copytree(one_seed, tmp_path / "grown")
    one = tables(folder)
    assert "already complete" in call(folder)[0]
    case = folder / "cases" / "joy-crowd-1-seed-0.npz"
    held = case.read_bytes()
    call(folder, "--num-seeds", 2)
    assert tables(folder) == tables(run) != one and case.read_bytes() == held
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["dtype"] == NATIVE
    assert verify_run(folder) == ([], []) and not (folder / ".parts").exists()
    for fewer in (("--num-seeds", 1), ("--target-emotion", "fear")):
        assert "too: name it too (targets, crowds, seeds), or choose another" in call(folder, *fewer, check=2)[1]
    case.write_bytes(held[:-1])
    for options in (("--num-seeds", 3), ("--num-seeds", 2, "--redo-tables")):
        assert "cases/joy-crowd-1-seed-0.npz: is not as the run wrote it" in call(folder, *options, check=2)[1]
    assert tables(folder) == tables(run)


def test_a_dry_run_counts_what_is_left(monkeypatch, tmp_path):
    counted = []
    monkeypatch.setattr(main, "estimated_seconds", lambda work, epochs, games, *others: counted.append(games) or 60.0)
    asked = Settings(num_crowds=2, num_seeds=2)
    assert ": 4 repetitions of 6 people" in main.describe(asked, tmp_path, "cpu")
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "joy-crowd-2-seed-0.npz").touch()
    assert ": 4 repetitions (1 finished before) of 6 people" in main.describe(asked, tmp_path, "cpu")
    assert ": 4 repetitions of 6 people" in main.describe(replace(asked, overwrite=True), tmp_path, "cpu")
    assert counted == [4, 3, 4]


def test_cases_of_another_precision_are_added_to(call, run, one_seed, tmp_path):
    """As a machine without bfloat16 goes on with a run of one that has it, made before cases said their precision."""
    folder = shutil.copytree(one_seed, tmp_path / "moved")
    (case,) = cases(folder)
    arrays = load_arrays(case)
    assert str(arrays.pop("played/dtype")) == NATIVE
    save_arrays(case, arrays)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    hashes = output_hashes(folder)
    (folder / "run.json").write_text(json.dumps(record | {"dtype": "float16", "outputs_sha256": hashes}))
    assert "already complete" in call(folder)[0]
    for options in ((), ("--redo-tables",)):
        call(folder, "--num-seeds", 2, *options)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert record["dtype"] == {"joy-crowd-1-seed-0": "float16", "joy-crowd-1-seed-1": NATIVE}
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert f"joy-crowd-1-seed-0: float16, joy-crowd-1-seed-1: {NATIVE}" in page
        assert tables(folder) == tables(run) and verify_run(folder) == ([], [])
        (folder / "summary.csv").write_text("")
    (folder / "run.json").write_text(json.dumps(record | {"dtype": NATIVE}))
    shutil.copy(run / "summary.csv", folder)
    assert verify_run(folder)[0] == []  # the first case does not say it
    (folder / "run.json").write_text(json.dumps(record | {"dtype": "float16"}))
    assert verify_run(folder)[0] == [f"cases/joy-crowd-1-seed-1.npz: {NATIVE}, not run.json's"]


def test_unfinished_work_of_another_precision_is_done_again(call, run, world, warm, tmp_path):
    """Killed, moved to a machine of another precision, killed and moved back: the bytes are this machine's."""
    folder, environment = tmp_path / "moved", {"XDG_CACHE_HOME": world / "cache"}
    code, *_ = warm.call(
        "crowd_fine_tuning_sim", arguments(world, folder), world, environment, send=signal.SIGKILL, parts=(12, folder)
    )
    assert code == -signal.SIGKILL
    (folder / ".parts" / NATIVE).rename(folder / ".parts" / "float16")
    own = folder / "adapters" / "joy-crowd-1-seed-0-random-l2-marginal"
    own.mkdir(parents=True)
    (own / "adapter_model.safetensors").write_bytes(b"of another precision")
    call(folder)
    case = "cases/joy-crowd-1-seed-0.npz"
    assert (folder / case).read_bytes() == (run / case).read_bytes()
    made, expected = (
        {path.parent.name: path.read_bytes() for path in (each / "adapters").glob("*/*.safetensors")}
        for each in (folder, run)
    )
    mine = {name: weights for name, weights in expected.items() if "-seed-0-" in name}
    assert made == mine and not (folder / ".parts").exists()


def test_tables_are_made_again(call, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "redone")
    shutil.rmtree(folder / "adapters")
    for name in ("summary.csv", "agreement.csv", "agreement.png", "report.html"):
        (folder / name).write_text("")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    # As one that was killed while it made them leaves the folder.
    (folder / ".parts").mkdir()
    (folder / ".parts" / "redone").touch()
    call(folder, "--num-seeds", 2, figures=True)
    for name in ("summary.csv", "agreement.csv", "agreement.png"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    assert "<h1>" in (folder / "report.html").read_text(encoding="utf-8") and not (folder / ".parts").exists()
    again = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    weights = {name: digest for name, digest in record["outputs_sha256"].items() if name.startswith("adapters/")}
    assert again["left_out_sha256"] == weights != {} and verify_run(folder) == ([], [])
    call(folder, "--num-seeds", 2, "--redo-tables")
    assert not list(folder.glob("*.png"))
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["left_out_sha256"] == weights
    case = folder / "cases" / "joy-crowd-1-seed-0.npz"
    arrays = load_arrays(case)
    save_arrays(case, arrays | {"crowd/near": arrays["crowd/near"][::-1]})
    (folder / "run.json").write_text(json.dumps(again | {"outputs_sha256": output_hashes(folder)}))
    errors = call(folder, "--num-seeds", 2, "--redo-tables", check=2)[1]
    assert "joy-crowd-1-seed-0.npz: was played with other texts than are dealt here" in errors
    assert "already complete" in call(folder, "--num-seeds", 2)[0]  # its tables were not touched
    assert "holds no finished run" in call(tmp_path / "new", "--redo-tables", check=2)[1]
    assert not (tmp_path / "new").exists()
    assert "choose one" in call(folder, "--redo-tables", "--overwrite", check=2)[1]


def test_tables_are_recomputed_from_the_cases(run, tmp_path):
    cells = (
        ("coalitions", "static_value", 3),
        ("finals", "distance", 2),
        ("rounds", "reward", 1),
        ("users", "texts", 1),
    )
    for table, column, row in cells:
        copy = shutil.copytree(run, tmp_path / f"{table}-{column}")
        written = pd.read_csv(copy / f"{table}.csv", dtype={"coalition": str})
        written.loc[row, column] += 1 if column == "texts" else 1e-6
        written.to_csv(copy / f"{table}.csv", index=False)
        assert any(line.startswith(f"{table}.csv: row {row + 2}: {column}") for line in verify_run(copy)[0])
    case = copy / "cases" / "joy-crowd-1-seed-1.npz"
    case.write_bytes(case.read_bytes()[:-100])
    assert any("joy-crowd-1-seed-1.npz: missing or damaged" in line for line in verify_run(copy)[0])
    shutil.rmtree(copy / "cases")
    assert {line.partition(":")[0] for line in verify_run(copy)[1]} == {"cases", "protocols and coalitions"}


def test_runs_are_compared(run, call, tmp_path):
    call(tmp_path / "other", "--num-seeds", 2, "--num-rounds", 1, "--scoring", "marginal")
    assert compare([str(run), str(tmp_path / "other"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    of_run, of_other = (pd.read_csv(folder / "agreement.csv") for folder in (run, tmp_path / "other"))
    first, other = (own.query("scoring == 'marginal'")["pearson"].mean() for own in (of_run, of_other))
    assert np.isfinite(other - first) and "num_rounds" in page
    assert f"{other - first:.3f}".replace("-", "−") in page


def test_a_mistake_in_a_function_of_ones_own_shows_before_models_are_tuned(world, call, tmp_path):
    """A metric that cannot take several samples, or that is no number where nothing is contributed."""
    (world / "mine.py").write_text(
        "import numpy as np\n"
        "def flat(mean, centroid): return -np.array([abs(float(m) - c) for m, c in zip(mean[0], centroid)])\n"
        "def cosine(mean, centroid):\n"
        "    with np.errstate(invalid='ignore'):\n"
        "        return (mean * centroid).sum(-1) / np.linalg.norm(mean, axis=-1)\n"
    )
    for name, told in (("mine:flat", "flat"), ("mine:cosine", "zero vector")):
        _, errors = call(tmp_path / "none", "--metric", name, check=2)
        assert errors.count("\n") == 1 and told in errors and not (tmp_path / "none").exists(), errors


def test_killed_and_with_two_jobs_the_bytes_are_the_same(world, warm, call, run, tmp_path):
    folder, environment = tmp_path / "killed", {"XDG_CACHE_HOME": world / "cache"}
    command = arguments(world, folder, "--num-seeds", 2, "--jobs", 1)
    code, *_ = warm.call(
        "crowd_fine_tuning_sim", command, world, environment, send=signal.SIGKILL, parts=(8, folder)
    )  # two parts of in-run values, and samples
    assert code == -signal.SIGKILL and len(list(folder.glob(".parts/*/models/*/samples/*.npz"))) >= 5
    assert not (folder / "run.json").exists()
    call(folder, "--num-seeds", 2, "--jobs", 2)
    assert tables(folder) == tables(run)


def test_a_cluster_gives_the_same_bytes(call, cluster, tmp_path):
    """In-run values, competitions and coalitions are made by two workers that share no folder with the run."""
    small = ("--num-users", 2, "--num-rounds", 1, "--scoring", "attributed")
    call(tmp_path / "here", *small)
    call(tmp_path / "there", *small, "--jobs", 2, "--backend", "dask", "--scheduler", cluster[0])
    assert tables(tmp_path / "there") == tables(tmp_path / "here") != {}


def test_sampled_reference_and_anonymous_people(call, tmp_path):
    options = ("--reference", "sampled", "--retrainings", 6, "--anonymous", "--scoring", "ranked")
    call(tmp_path / "sampled", *options)
    points = pd.read_csv(tmp_path / "sampled" / "points.csv")
    assert points["user"].tolist() == [1, 2, 3] and points["shapley"].notna().all()
    assert len(pd.read_csv(tmp_path / "sampled" / "coalitions.csv")) == 6
    assert verify_run(tmp_path / "sampled")[0] == []


def test_without_a_reference_there_is_no_pay(call, tmp_path):
    call(tmp_path / "none", "--reference", "none", "--scoring", "ranked")
    assert pd.read_csv(tmp_path / "none" / "points.csv")[["pay", "shapley"]].isna().all(axis=None)
    assert not (tmp_path / "none" / "ledger.csv").exists()
    assert "ledger" not in (tmp_path / "none" / "report.html").read_text()
    assert verify_run(tmp_path / "none")[0] == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--user-column", "name"), "name"),
        (("--num-users", 7), "7 are asked for"),
        (("--num-users", 1), "--num-users"),
        (("--num-users", 9), "--reference exact"),
        (("--target-emotion", "joyy"), "did you mean joy"),
        (("--crowd", "nothing.csv"), "nothing.csv"),
        (("--metric", "l2", "l1", "--reference", "sampled"), "name one"),
        (("--kinds", "angry"), "--kinds angry"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(call, tmp_path, more, said):
    _, errors = call(tmp_path / "none", *more, check=2)
    assert errors.count("\n") == 1 and said in errors
    assert not (tmp_path / "none").exists()


def test_a_crowd_file_that_changed_is_another_run(world, call, run):
    people = world / "people.csv"
    before = people.read_bytes()
    people.write_bytes(before + b"p1,what a new day it is\n")
    try:
        _, errors = call(run, "--num-seeds", 2, check=2)
        assert "crowd_sha256" in errors
    finally:
        people.write_bytes(before)
