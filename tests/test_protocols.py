"""The protocols' moves on made-up samples, the intervals of the results; targets against a brute-force reference."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiment.errors import InputError
from experiment.statistics import mean_interval, pooled_interval
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import Averaged, Request, Sampled, Tuned, merge_requests, name_of
from point_in_space_sim.measures import MEASURES, energy
from point_in_space_sim.pool import Pool, find_users, users_pool
from point_in_space_sim.protocols import PROTOCOLS, Game, deal, derived_seed, play, without, work_of
from point_in_space_sim.results import (
    finished_targets,
    generation_table,
    load_game,
    overall,
    pick,
    published,
    save_game,
    summary_table,
)
from point_in_space_sim.target import (
    Target,
    distances_to,
    emotion_target,
    find_neighbourhood,
    mixture_target,
    parse_mixture,
    part_sizes,
    single_sizes,
    slug,
    text_target,
)

AIM = np.full(28, 0.3)


def game(neighbours=100, generations=3, variants=3, seed=0, target="joy", users=None):
    texts = tuple(f"comment {i}" for i in range(neighbours))
    units = tuple((text,) for text in texts) if users is None else tuple(texts[i::users] for i in range(users))
    return Game(target, Pool(texts, texts[::2], units), AIM, seed, generations, variants)


class Fake:
    """Stands in for the models: every sample's vectors follow from the model's name and the sample's seed."""

    def __init__(self, samples=5):
        self.samples, self.steps = samples, []

    def __call__(self, orders):
        self.steps.append([request for _, request in orders])
        finished = []
        for owner, request in orders:
            drawn = {}
            for sample in request.samples:
                generator = np.random.default_rng([sample, derived_seed(0, name_of(request.model))])
                vectors = generator.random((self.samples, 28))
                texts = tuple(f"{name_of(request.model)} {sample} {i}" for i in range(self.samples))
                drawn[name_of(request.model), sample] = Sampled(texts, vectors, 0.0)
            finished.append(((owner, request), drawn))
        return finished


class OneAtATime(Fake):
    """Finishes the order that came last, whoever's it is: no protocol may depend on the order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def __call__(self, orders):
        self.open += super().__call__(orders)
        return [self.open.pop()]


def played(game, protocols=None, fulfil=None):
    """The draws and samples of one game."""
    ((_, drawn),) = play([game], fulfil or Fake(), protocols)
    return drawn


def distance(sample):
    return np.linalg.norm(sample.vectors - AIM, axis=1).mean()


sizes = st.tuples(st.integers(3, 60), st.integers(1, 4), st.integers(2, 5)).filter(
    lambda size: size[0] * (1 - 1 / size[2]) ** (size[1] - 1) > size[2] + size[1]
)


@given(st.integers(2, 200), st.integers(2, 9), st.integers(0, 2**32))
def test_parts_are_equal_and_disjoint(count, variants, seed):
    pool = tuple(map(str, range(count)))
    parts = deal(pool, variants, np.random.default_rng(seed))
    assert len(parts) == variants and {len(part) for part in parts} == {count // variants}
    dealt = [text for part in parts for text in part]
    assert len(set(dealt)) == len(dealt) and set(dealt) <= set(pool)
    assert set(without(pool, parts[0])) == set(pool) - set(parts[0])


@pytest.mark.parametrize("users", [None, 12])
@pytest.mark.parametrize("protocol", ["multi", "multi_plus"])
@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1000))
def test_competition_step_by_step(protocol, users, size, seed):
    """Comma: the least distant variant becomes the model, its part leaves. Plus: unless the model is less distant."""
    size = size if users is None else (60, 2, 3)
    own = game(*size, seed=seed, users=users)
    drawn = played(own, [protocol])
    model, removed = None, set()
    for generation in range(1, own.generations + 1):
        choices = [(d, b) for d, b in drawn if (d.generation, d.role) == (generation, "selection")]
        variants = [draw for draw, _ in choices if draw.variant]
        assert [draw.variant for draw in variants] == list(range(1, own.variants + 1))
        incumbents = [(d, b) for d, b in choices if not d.variant]
        assert [name_of(d.model) for d, _ in incumbents] == ([name_of(model)] if protocol == "multi_plus" else [])
        dealt = [text for draw in variants for text in draw.model.texts]
        assert len({len(draw.model.texts) for draw in variants}) == 1 and len(set(dealt)) == len(dealt)
        assert not removed & set(dealt) and set(dealt) <= set(own.pool.texts)
        left = len(own.pool.texts) - len(removed)
        if users is None:
            assert len(variants[0].model.texts) == left // own.variants
        else:  # nobody's comments are torn apart
            units = [set(unit) for unit in own.pool.units]
            assert all(unit <= set(d.model.texts) or not unit & set(d.model.texts) for unit in units for d in variants)
        assert all(name_of(draw.model.start) == name_of(model) for draw in variants)
        assert len({draw.sample for draw, _ in choices}) == 1
        winner = min(choices, key=lambda choice: distance(choice[1]))[0]
        assert [draw.variant for draw, _ in choices if draw.kept] == [winner.variant]
        if winner.variant:
            removed |= set(winner.model.texts)
        model = winner.model
        ((report, _),) = [(d, b) for d, b in drawn if (d.generation, d.role) == (generation, "report")]
        assert report.model is model and report.variant == winner.variant
        assert report.sample not in {draw.sample for draw, _ in choices}


def test_plus_selection_keeps_a_model_that_no_variant_beats():
    stays = 0
    for seed in range(30):
        draws = [draw for draw, _ in played(game(seed=seed), ["multi_plus"])]
        reports = [draw for draw in draws if draw.role == "report"]
        stays += sum(draw.variant == 0 for draw in reports)
        chosen_by = [draw.sample for draw in draws if draw.role == "selection" and draw.variant == 0]
        assert len(set(chosen_by)) == 3  # a fresh sample every generation
        for before, after in pairwise(reports):
            if after.variant == 0:
                assert after.model is before.model
    assert stays > 10


def test_random_picks_are_chains_one_from_each_first_variant():
    own = game()
    together = played(own, ["multi", "random_pick"])
    first = [d.model.name for d, _ in together if (d.protocol, d.generation, d.role) == ("multi", 1, "selection")]
    chains = [[d for d, _ in together if (d.protocol, d.variant) == ("random_pick", chain)] for chain in (1, 2, 3)]
    assert [chain[0].model.name for chain in chains] == first
    for chain in chains:
        assert [draw.generation for draw in chain] == [1, 2, 3] and all(draw.role == "report" for draw in chain)
        assert [len(draw.model.texts) for draw in chain] == [33, 22, 15]
        texts = [text for draw in chain for text in draw.model.texts]
        assert len(set(texts)) == len(texts)  # never on a comment twice
        assert chain[1].model.start is chain[0].model and chain[2].model.start is chain[1].model


def test_averages_have_the_same_budget_of_comments():
    drawn = played(game(), ["averaged"])
    assert [draw.generation for draw, _ in drawn] == [1, 2, 3] and all(draw.role == "report" for draw, _ in drawn)
    for (draw, _), size in zip(drawn, [33, 22, 15], strict=True):
        assert isinstance(draw.model, Averaged) and [len(model.texts) for model in draw.model.models] == [size] * 3
    assert all(model.start is drawn[0][0].model for model in drawn[1][0].model.models)


def test_single_models_their_choice_the_filter_and_the_oracle():
    own = game()
    drawn = played(own, ["single", "chosen", "filter", "oracle"])
    models = [draw.model for draw, _ in drawn if draw.protocol == "single"]
    texts = own.pool.texts
    assert [model.texts for model in models] == [texts[:33], texts[:66], texts]
    assert all(model.start is None for model in models)
    choices = [(draw, sample) for draw, sample in drawn if (draw.protocol, draw.role) == ("chosen", "selection")]
    assert [draw.model.name for draw, _ in choices] == [model.name for model in models]
    nearest = min(choices, key=lambda choice: distance(choice[1]))[0]
    last = {draw.protocol: draw.model.name for draw, _ in drawn if draw.role == "report"}
    assert last["chosen"] == nearest.model.name and last["filter"] == models[0].name
    ((oracle, _),) = [(d, s) for d, s in drawn if d.protocol == "oracle"]
    assert oracle.model.texts == texts[::2]


def test_a_protocol_shares_models_but_depends_on_no_other_and_on_no_order():
    fake, games = Fake(), [game(), game(seed=1)]
    described = {
        own.name: [(d.protocol, d.generation, d.variant, d.role, name_of(d.model), d.sample, d.kept) for d, _ in drawn]
        for own, drawn in play(games, fake)
    }
    for own in games:
        ((_, drawn),) = play([own], OneAtATime())
        again = [(d.protocol, d.generation, d.variant, d.role, name_of(d.model), d.sample, d.kept) for d, _ in drawn]
        assert again == described[own.name]
        for protocol in PROTOCOLS:
            alone = [d for d, _ in played(own, [protocol])]
            rows = [row for row in described[own.name] if row[0] == protocol]
            assert [(d.generation, d.variant, name_of(d.model)) for d in alone] == [
                (row[1], row[2], row[4]) for row in rows
            ]
    first = {name: {row[4] for row in described[games[0].name] if row[:2] == (name, 1)} for name in PROTOCOLS}
    assert first["multi_plus"] == first["multi"] | {"base"} and first["random_pick"] == first["multi"]


def test_reports_are_paired_and_never_the_sample_that_chose():
    drawn = played(game())
    reports = {draw.sample for draw, _ in drawn if draw.role == "report"}
    selections = {draw.sample for draw, _ in drawn if draw.role == "selection"}
    assert len(reports) == 1 and len(selections) == 3 and not reports & selections


def test_seeds_differ_by_purpose_target_seed_and_generation():
    games = [game(seed=seed, target=target) for seed in (0, 1) for target in ("joy", "fear")]
    seeds = [
        own.seed_of(purpose, generation)
        for own in games
        for purpose in ("deal", "tune", "report", "selection")
        for generation in (0, 1, 2)
    ]
    assert len(set(seeds)) == len(seeds)
    assert derived_seed(3, "a", 1) == derived_seed(3, "a", 1)


def test_merged_requests():
    model = Tuned(("a",), None, 0)
    same = Tuned(("a",), None, 0)
    merged = merge_requests([Request(model, (1,)), Request(None, (2,)), Request(same, (1, 3), ("kept",))])
    assert [(name_of(r.model), r.samples, r.keep_as) for r in merged] == [
        (model.name, (1, 3), ("kept",)),
        ("base", (2,), ()),
    ]
    names = {Tuned(*recipe).name for recipe in [(("a",), None, 1), (("a",), model, 0), (("a",), None, 0, ("a", "b"))]}
    assert len(names | {model.name}) == 4


def test_work_of_the_study():
    """Single models, the first generation once, then three variants twice for each competition, three chains and an
    average; at most, since protocols may share a model."""
    pool = game().pool
    most = 199 + 99 + 3 * 7 * 22 // 1 + 4 * 3 * 22
    work = work_of([name for name in PROTOCOLS if name != "oracle"], pool, 3, 3, 50)
    assert 0.6 * most < work.tuned <= most and 6 <= work.at_once <= 12
    assert work_of(["base", "single", "multi"], pool, 3, 3, 50).tuned == 199 + 99 + 3 * 22 + 3 * 15
    assert work_of(["base"], pool, 3, 3, 50).sampled == 50
    multi = work_of(["multi"], pool, 3, 3, 50)
    assert (multi.draws, multi.sampled) == (12, 50 * 12)


def test_finished_games_are_read_as_they_were_written(tmp_path):
    texts = ["", "a\nb", "\u00e9 \U0001f600", "'quoted, \"text\"'"]
    comments = pd.DataFrame({"emotion": "joy", "text": texts, "distance": np.random.default_rng(0).random(4)})
    draws = pd.DataFrame({"emotion": ["joy"], "seed": [3], "kept": [True], "broken": [0.1]})
    save_game(tmp_path / "joy-seed-3.npz", {"comments": comments, "draws": draws})
    for name, table in load_game(tmp_path / "joy-seed-3.npz").items():
        pd.testing.assert_frame_equal(table, {"comments": comments, "draws": draws}[name], check_exact=True)
    assert list(finished_targets(tmp_path, [3])) == ["joy"] and finished_targets(tmp_path, [3, 4]) == {}
    (tmp_path / "joy-seed-3.npz").write_bytes(b"PK")
    assert load_game(tmp_path / "joy-seed-3.npz") is None and finished_targets(tmp_path, [3]) == {}


def test_published_figures_are_the_ones_that_the_study_states():
    table = published()
    assert set(table["emotion"]) == set(EMOTIONS)
    means = table.drop(columns="emotion").mean()
    assert means.drop("reduction_percent").round(3).tolist() == [0.217, 0.718, 0.625, 0.609, 0.714, 0.570, 0.448]
    assert means["reduction_percent"] == pytest.approx(28.5, abs=0.05)


@pytest.mark.parametrize("targets", [1, 6])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_few_seeds_cover(targets, seeds):
    """Seeds differ (between) and comments within them, skewed; of several targets, by up to twice as much in some."""
    generator = np.random.default_rng(targets * 10 + seeds)
    repeats = 2000
    spread = np.linspace(0.07, 0.14, targets)[:, None]
    hits = 0.0
    for _ in range(repeats):
        means = 0.4 + generator.normal(size=(targets, seeds)) * spread
        values = means[:, :, None] + generator.gamma(4.0, 0.1, size=(targets, seeds, 50)) - 0.4
        _, low, high = pooled_interval(values.mean(axis=2))
        hits += ((low <= 0.4) & (high >= 0.4)).mean()
    assert 0.92 < hits / repeats < 0.98


def test_intervals_over_comments_and_targets_cover():
    generator = np.random.default_rng(0)
    values = generator.gamma(4.0, 0.1, size=(4000, 50))
    _, low, high = mean_interval(values)
    assert 0.92 < ((low <= 0.4) & (high >= 0.4)).mean() < 0.98
    with pytest.raises(ValueError, match="one repeat"):
        pooled_interval(np.zeros((3, 1)))


def samples_of(seed, n=40, k=30):
    generator = np.random.default_rng(seed)
    near = np.clip(generator.normal(0.3, 0.1, size=(k, 28)), 0, 1)
    vectors = np.clip(generator.normal(0.35, 0.15, size=(n, 28)), 0, 1)
    return vectors, [f"text {i % 25}" for i in range(n)], near


def test_measures_are_their_definitions():
    vectors, texts, near = samples_of(0)
    value = {name: measure.values(vectors, texts, near).mean() for name, measure in MEASURES.items()}
    centroid = near.mean(axis=0)
    assert value["distance"] == pytest.approx(np.mean([np.sqrt(((x - centroid) ** 2).sum()) for x in vectors]))
    assert value["centre"] == pytest.approx(np.sqrt(((vectors.mean(axis=0) - centroid) ** 2).sum()))
    assert value["distinct"] == pytest.approx(25 / 40)

    def apart(pairs):
        return np.mean([np.sqrt(((x - y) ** 2).sum()) for x, y in pairs])

    across = apart((x, y) for x in vectors for y in near)
    within = [apart((x, y) for i, x in enumerate(own) for y in own[:i]) for own in (vectors, near)]
    assert value["energy"] == pytest.approx(2 * across - sum(within))


def test_energy_distance_is_unbiased_and_sees_what_the_mean_distance_rewards():
    generator = np.random.default_rng(1)
    near = generator.random((60, 28))
    same = [energy(generator.random((20, 28)), [], near).mean() for _ in range(300)]
    assert abs(np.mean(same) - energy(generator.random((4000, 28)), [], near).mean()) < 3 * np.std(same) / 300**0.5
    collapsed = np.repeat(near.mean(axis=0)[None], 20, axis=0)
    assert MEASURES["distance"].values(collapsed, [], near).mean() < 1e-9 < 0.5 < energy(collapsed, [], near).mean()


@pytest.mark.parametrize("name", ["energy", "centre"])
def test_a_comments_number_varies_as_the_measure_does(name):
    """The standard error that follows from one sample's numbers, against the measure's deviation over samples."""
    near = samples_of(0)[2]
    found = [MEASURES[name].values(samples_of(seed)[0], [], near) for seed in range(400)]
    errors = [values.std(ddof=1) / len(values) ** 0.5 for values in found]
    assert np.mean(errors) == pytest.approx(np.std([values.mean() for values in found]), rel=0.15)


def table_of(rows):
    """comments.csv of one target: {(protocol, generation, variant, role): distances (seeds, n)}."""
    tables = []
    for (protocol, generation, variant, role), distances in rows.items():
        for seed, values in enumerate(distances):
            tables.append(
                pd.DataFrame(
                    {
                        "emotion": "joy",
                        "protocol": protocol,
                        "generation": generation,
                        "variant": variant,
                        "seed": seed,
                        "role": role,
                        "text": "so glad",
                        "distance": values,
                        **dict.fromkeys(EMOTIONS, 0.0),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def test_summary_reports_fresh_samples_with_paired_intervals():
    generator = np.random.default_rng(1)
    shared = generator.random((2, 50))
    comments = table_of(
        {
            ("base", 0, 0, "report"): 1.1 + 0 * shared,
            ("single", 1, 1, "report"): 9 + shared,
            ("single", 2, 1, "report"): 0.5 + shared,
            ("multi", 1, 1, "selection"): 0.01 * shared,
            ("multi", 1, 2, "selection"): 7 + shared,
            ("multi", 1, 1, "report"): 0.3 + shared,
            ("random_pick", 1, 1, "report"): 0.2 + shared,
            ("random_pick", 1, 2, "report"): 0.6 + shared,
            ("averaged", 1, 0, "report"): 0.2 + shared,
        }
    )
    draws = comments.drop_duplicates(["protocol", "generation", "variant", "seed", "role"]).assign(
        training_comments=5, broken=0.0
    )
    draws["kept"] = ~((draws["variant"] == 2) & (draws["protocol"] == "multi"))
    neighbourhood = pd.DataFrame(
        {
            "emotion": "joy",
            "rank": [0, 1, 2],
            "text": ["t", "so glad", "u"],
            "distance": [0.1, 0.3, 0.5],
            **dict.fromkeys(EMOTIONS, 0.0),
        }
    )
    generations = generation_table(comments, draws, neighbourhood)
    summary = summary_table(comments, generations, neighbourhood)

    def said(*which):
        return pick(summary, *which)[["value", "low", "high"]].to_numpy()[0]

    assert set(summary["seeds"]) == {1, 2} and said("distance", "neighbourhood")[0] == pytest.approx(0.4)
    assert said("distance", "single")[0] == pytest.approx(0.5 + shared.mean(), abs=1e-6)
    assert said("distance", "multi")[0] == pytest.approx(0.3 + shared.mean(), abs=1e-6)
    assert said("reduction_percent", "multi", "single")[0] == pytest.approx(20 / (0.5 + shared.mean()), abs=1e-5)
    # Comment by comment the difference is the same: paired, its interval has no width. Chains count by their mean.
    for other, difference in (("single", -0.2), ("random_pick", -0.1), ("averaged", 0.1)):
        assert said("distance", "multi", other) == pytest.approx([difference] * 3, abs=1e-6)
    value, low, high = said("distance", "multi")
    of_seeds = (0.3 + shared).mean(axis=1)
    assert (value, low, high) == pytest.approx([float(end) for end in mean_interval(of_seeds)], abs=1e-6)
    fresh_minus_selection = said("distance", "multi", "selection")[0]
    assert fresh_minus_selection == pytest.approx((0.3 + 0.99 * shared).mean(), abs=1e-6)
    assert said("distinct", "multi")[0] == pytest.approx(1 / 50)
    kept = generations[generations["kept"] & (generations["protocol"] == "multi")]
    assert sorted(kept["role"]) == ["report", "report", "selection", "selection"]
    assert set(generations["copied"]) == {1.0}
    assert overall(summary)["targets"].eq(1).all()


def test_users_share_the_neighbourhood_and_some_write_off_target():
    generator = np.random.default_rng(0)
    vectors, texts = generator.random((400, 28)), [f"comment {i}" for i in range(400)]
    near = find_neighbourhood(emotion_target("joy", vectors), vectors, 100)
    clean, dirty = (find_users(near, vectors, 12, share, np.random.default_rng(1)) for share in (0, 1 / 3))
    assert [user.on_target for user in dirty] == [True] * 8 + [False] * 4
    assert all((a.members == b.members).all() for a, b in zip(clean[:8], dirty[:8], strict=True))
    held = np.concatenate([user.members for user in dirty])
    assert len(set(held)) == len(held) == 96 and near.target.comment not in held
    assert all(set(user.members) <= set(near.members) for user in clean)
    assert not any(set(user.members) & set(near.members) for user in dirty[8:])
    assert len({user.writes for user in dirty[8:]}) == 4
    pool = users_pool(near, vectors, texts, dirty, "user")
    order = [np.linalg.norm(vectors[int(text.split()[1])] - near.target.vector) for text in pool.texts]
    assert order == sorted(order) and len(pool.texts) == 96
    assert set(pool.on_target) == {texts[i] for user in dirty[:8] for i in user.members}
    assert [set(unit) for unit in pool.units] == [{texts[i] for i in user.members} for user in dirty]
    by_comment = users_pool(near, vectors, texts, dirty, "comment")
    assert by_comment.texts == pool.texts and by_comment.units == tuple((text,) for text in pool.texts)
    with pytest.raises(InputError, match="101 users cannot share 100 comments"):
        find_users(near, vectors, 101, 0, np.random.default_rng(1))
    with pytest.raises(InputError, match="are to be off target"):
        small = find_neighbourhood(emotion_target("joy", vectors[:110]), vectors[:110], 100)
        find_users(small, vectors[:110], 12, 0.9, np.random.default_rng(1))


# ------------------------------------------------------------------ targets


# Few distinct values, so that ties occur.
vector_sets = arrays(np.float32, st.tuples(st.integers(6, 20), st.just(28)), elements=st.sampled_from([0.0, 0.25, 1.0]))


@given(vectors=vector_sets, emotion=st.sampled_from(EMOTIONS), size=st.integers(1, 5))
def test_neighbourhood_equals_brute_force(vectors, emotion, size):
    target = emotion_target(emotion, vectors)
    found = find_neighbourhood(target, vectors, size)

    column = [float(row[EMOTIONS.index(emotion)]) for row in vectors]
    assert target.comment == column.index(max(column))
    ranked = sorted(
        (sum((float(a) - float(b)) ** 2 for a, b in zip(row, vectors[target.comment], strict=True)), i)
        for i, row in enumerate(vectors)
        if i != target.comment
    )
    assert found.members.tolist() == [i for _, i in ranked[:size]]
    mean = [sum(float(vectors[i][d]) for i in found.members) / size for d in range(28)]
    assert found.centroid == pytest.approx(mean)
    expected = [sum((float(vectors[i][d]) - mean[d]) ** 2 for d in range(28)) ** 0.5 for i in found.members]
    assert found.distances == pytest.approx(expected, abs=1e-12)


def test_target_that_is_no_comment_leaves_none_out():
    vectors = np.eye(28, dtype=np.float32)
    assert find_neighbourhood(Target("anywhere", vectors[3]), vectors, 28).members[0] == 3
    assert 3 not in find_neighbourhood(Target("comment", vectors[3], 3), vectors, 27).members


def test_text_target_is_left_out_where_the_corpus_holds_it():
    vectors = np.eye(28, dtype=np.float32)
    texts = [f"text {i}" for i in range(28)]
    assert text_target("text 5", vectors[5], texts).comment == 5
    assert text_target("another", vectors[5], texts).comment is None


def test_mixture_is_the_point_with_these_probabilities():
    weights = parse_mixture("joy=0.7, gratitude=0.3")
    assert weights == {"joy": 0.7, "gratitude": 0.3}
    target = mixture_target(weights)
    assert target.name == "joy=0.7,gratitude=0.3" and target.comment is None
    assert target.vector[EMOTIONS.index("joy")] == np.float32(0.7)
    assert float(target.vector.sum()) == pytest.approx(1.0) and np.count_nonzero(target.vector) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joy", "not EMOTION=PROBABILITY"),
        ("joy=high", "not EMOTION=PROBABILITY"),
        ("", "not EMOTION=PROBABILITY"),
        ("joy=0.5,", "not EMOTION=PROBABILITY"),
        ("jo=0.5", "did you mean joy"),
        ("joy=1.5", "at most 1"),
        ("joy=0", "above 0"),
        ("joy=nan", "above 0"),
        ("joy=0.5,joy=0.2", "every emotion once"),
    ],
)
def test_bad_mixtures(text, message):
    with pytest.raises(InputError, match=message):
        parse_mixture(text)


def test_bad_targets():
    vectors = np.eye(28, dtype=np.float32)
    with pytest.raises(InputError, match="did you mean gratitude"):
        emotion_target("gratitud", vectors)
    with pytest.raises(InputError, match="27 comments beside the target"):
        find_neighbourhood(emotion_target("joy", vectors), vectors, 28)


def test_sizes_of_the_study():
    assert single_sizes(100) == [33, 66, 100]
    assert part_sizes(100, 3, 3) == [33, 22, 15]
    with pytest.raises(InputError, match="2 are left for generation 4"):
        part_sizes(6, 9, 3)


def test_distances_are_euclidean_in_double_precision():
    vectors = np.zeros((2, 28), dtype=np.float32)
    vectors[1, :2] = 3, 4
    assert distances_to(np.zeros(28), vectors).tolist() == [0.0, 5.0]


def test_targets_names_as_file_names():
    assert slug("joy") == "joy"
    names = ["joy", '"joy"', '"Joy"', '"joy!"', "joy=1", '"../../joy"', '"\u559c\u60a6"', '"' + "a" * 300 + '"']
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 50 for name in slugs)


def test_the_pools_of_the_study_can_be_run_and_have_one_size():
    from point_in_space_sim import study_pools
    from point_in_space_sim.main import planned_pool
    from point_in_space_sim.settings import check_settings

    runs = study_pools.pools(study_pools.Settings(real="comments.tsv"))
    assert len(runs) == 7
    for name, own in runs.items():
        check_settings(own)
        pool = planned_pool(own)
        assert len(pool.texts) == (100 if name == "real" else 96)
        off = study_pools.OFF_TARGET.get(name.partition("-")[0], 0)
        assert len(pool.texts) - len(pool.on_target) == 8 * off
        assert len(pool.units) == (12 if name.endswith("user") else len(pool.texts))
