"""Targets and neighbourhoods against a brute-force reference; what cannot be a target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
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
