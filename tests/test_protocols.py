"""The protocols' moves on made-up samples, the intervals of the results; targets against a brute-force reference."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import Averaged, Request, Sampled, Tuned, merge_requests, name_of
from point_in_space_sim.protocols import PROTOCOLS, Game, deal, derived_seed, play, without, work_of
from point_in_space_sim.results import (
    bootstrap_indices,
    finished_targets,
    generation_table,
    interval,
    load_game,
    published,
    resampled_means,
    save_game,
    summary_row,
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


def game(neighbours=100, generations=3, variants=3, seed=0, target="joy"):
    return Game(target, tuple(f"comment {i}" for i in range(neighbours)), AIM, seed, generations, variants)


class Fake:
    """Stands in for the models: every sample's vectors follow from the model's name and the sample's seed."""

    def __init__(self, samples=5):
        self.samples, self.steps = samples, []

    def __call__(self, requests):
        self.steps.append(requests)
        drawn = {}
        for request in requests:
            for sample in request.samples:
                generator = np.random.default_rng([sample, derived_seed(0, name_of(request.model))])
                vectors = generator.random((self.samples, 28))
                texts = tuple(f"{name_of(request.model)} {sample} {i}" for i in range(self.samples))
                drawn[name_of(request.model), sample] = Sampled(texts, vectors, 0.0)
        return drawn


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


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1000))
def test_competition_never_trains_on_a_removed_comment(size, seed):
    own = game(*size, seed=seed)
    played = play(own, Fake(), ["multi"])
    best, removed = None, set()
    for generation in range(1, own.generations + 1):
        choices = [(d, b) for d, b in played if (d.generation, d.role) == (generation, "selection")]
        parts = [draw.model.texts for draw, _ in choices]
        assert len(parts) == own.variants
        assert {len(part) for part in parts} == {part_sizes(*size)[generation - 1]}
        dealt = [text for part in parts for text in part]
        assert len(set(dealt)) == len(dealt)
        assert not removed & set(dealt) and set(dealt) <= set(own.texts)
        assert all(name_of(draw.model.start) == name_of(best) for draw, _ in choices)
        winner = min(choices, key=lambda choice: np.linalg.norm(choice[1].vectors - AIM, axis=1).mean())[0]
        assert [draw.variant for draw, _ in choices if draw.kept] == [winner.variant]
        best = winner.model
        removed |= set(best.texts)
        ((report, _),) = [(d, b) for d, b in played if (d.generation, d.role) == (generation, "report")]
        assert report.model is best and report.variant == winner.variant
        assert report.sample not in {draw.sample for draw, _ in choices}


@pytest.mark.parametrize("protocol", ["sequential", "averaged"])
def test_controls_have_the_same_budget_of_comments(protocol):
    own = game()
    played = play(own, Fake(), [protocol])
    assert [draw.generation for draw, _ in played] == [1, 2, 3] and all(draw.role == "report" for draw, _ in played)
    for (draw, _), size in zip(played, [33, 22, 15], strict=True):
        models = draw.model.models if isinstance(draw.model, Averaged) else [draw.model]
        assert [len(model.texts) for model in models] == [size] * (3 if protocol == "averaged" else 1)
    # Sequential never trains on a comment twice.
    if protocol == "sequential":
        texts = [text for draw, _ in played for text in draw.model.texts]
        assert len(set(texts)) == len(texts)
        assert played[2][0].model.start is played[1][0].model
    else:
        assert all(model.start is played[0][0].model for model in played[1][0].model.models)


def test_single_models_are_independent_and_nearest_first():
    own = game()
    models = [draw.model for draw, _ in play(own, Fake(), ["single"])]
    assert [model.texts for model in models] == [own.texts[:33], own.texts[:66], own.texts]
    assert all(model.start is None for model in models)


def test_protocols_share_their_first_generation_and_each_model_is_asked_for_once_a_step():
    fake = Fake()
    played = play(game(), fake)
    first = {
        name: [d for d, _ in played if d.protocol == name and d.generation == 1]
        for name in ("multi", "sequential", "averaged")
    }
    variants = [draw.model.name for draw in first["multi"] if draw.role == "selection"]
    assert first["sequential"][0].model.name in variants
    assert [model.name for model in first["averaged"][0].model.models] == variants
    for step in fake.steps:
        assert len({name_of(request.model) for request in step}) == len(step)
    made = {name_of(request.model) for step in fake.steps for request in step if isinstance(request.model, Tuned)}
    # 3 single, 3 shared, then 3 + 1 + 3 in each of two generations.
    assert len(made) == 20
    assert len(fake.steps) == 4


def test_reports_are_paired_and_never_the_sample_that_chose():
    played = play(game(), Fake())
    reports = {draw.sample for draw, _ in played if draw.role == "report"}
    selections = {draw.sample for draw, _ in played if draw.role == "selection"}
    assert len(reports) == 1 and len(selections) == 3 and not reports & selections


def test_a_protocol_does_not_depend_on_which_others_are_played():
    together = [(d.protocol, d.generation, d.variant, name_of(d.model), d.sample) for d, _ in play(game(), Fake())]
    for protocol in PROTOCOLS:
        alone = play(game(), Fake(), [protocol])
        assert [(d.protocol, d.generation, d.variant, name_of(d.model), d.sample) for d, _ in alone] == [
            row for row in together if row[0] == protocol
        ]


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
    """Single models, the first generation once, then three variants twice and a random pick; at most, since protocols
    may share a model."""
    most = 199 + 99 + 7 * 22 + 7 * 15, 50 * (4 + 9 + 9)
    work = work_of(list(PROTOCOLS), 100, 3, 3, 50)
    assert 0.8 * most[0] < work.tuned <= most[0] and 0.8 * most[1] < work.sampled <= most[1]
    assert 6 <= work.at_once <= 7
    assert work_of(["base", "single", "multi"], 100, 3, 3, 50).tuned == 199 + 99 + 3 * 22 + 3 * 15
    assert work_of(["base"], 100, 3, 3, 50).sampled == 50


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


@pytest.mark.parametrize("seeds, between", [(1, 0.0), (8, 0.0), (8, 0.1)])
def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(seeds, between):
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = generator.gamma(4.0, 0.1, size=(seeds, 20)) + generator.normal(0, between, size=(seeds, 1))
        low, high = interval(resampled_means(values, *bootstrap_indices(values.shape, generator)))
        hits += low <= 0.4 <= high
    assert 0.88 < hits / 200 < 0.985


def test_bootstrap_varies_as_the_seeds_and_comments_that_it_stands_for():
    """Against the formulas for the variance of a mean: over comments, and, two-level, over seeds as well."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1, 400))
    drawn = resampled_means(values, *bootstrap_indices(values.shape, generator))
    assert drawn.std() == pytest.approx(values.std() / 20, rel=0.05)
    values = np.repeat(generator.normal(size=(3, 1)), 40, axis=1)  # all variation is between seeds
    drawn = resampled_means(values, *bootstrap_indices(values.shape, generator))
    assert drawn.std() == pytest.approx(values[:, 0].std(ddof=1) / 3**0.5, rel=0.05)
    assert interval(np.full(10, 0.3)) == pytest.approx((0.3, 0.3))


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
            ("sequential", 1, 2, "report"): 0.4 + shared,
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
    row = summary_row(comments, generations, neighbourhood)

    assert row["seeds"] == 2 and row["neighbourhood_distance"] == pytest.approx(0.4)
    assert row["single_distance"] == pytest.approx(0.5 + shared.mean())
    assert row["multi_distance"] == pytest.approx(0.3 + shared.mean())
    assert row["reduction_percent"] == pytest.approx(100 * 0.2 / (0.5 + shared.mean()))
    # Comment by comment the difference is the same: paired, its interval has no width.
    for other, difference in (("single", -0.2), ("sequential", -0.1), ("averaged", 0.1)):
        bounds = [row[f"multi_minus_{other}{end}"] for end in ("", "_low", "_high")]
        assert bounds == pytest.approx([difference] * 3)
    assert row["multi_low"] < row["multi_distance"] < row["multi_high"]
    assert row["multi_selection_distance"] == pytest.approx(0.01 * shared.mean())
    chosen = row["multi_selection_distance"]
    assert row["multi_fresh_minus_selection"] == pytest.approx(row["multi_distance"] - chosen)
    kept = generations[generations["kept"] & (generations["protocol"] == "multi")]
    assert sorted(kept["role"]) == ["report", "report", "selection", "selection"]
    assert set(generations["copied"]) == {1.0}


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
    with pytest.raises(InputError, match="2 comments are left for generation 4"):
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
