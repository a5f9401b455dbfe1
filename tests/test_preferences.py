"""Users' vectors from GroupLens files and matrices, what of them is refused, and their convex hull."""

import gzip
import os
import re

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from experiment.errors import InputError
from user_grouping_evaluation_sim.hull import hull_distance
from user_grouping_evaluation_sim.preferences import Preferences, draw_crowds, read_matrix, read_movielens
from user_grouping_evaluation_sim.settings import DATA

MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Comedy
2,"American President, The (1995)",Comedy|Drama
7,Unknown (2000),(no genres listed)
9,"A ""quoted"" one",Drama
"""
RATINGS = """userId,movieId,rating,timestamp
5,1,4.0,100
3,2,3.5,101
5,2,2.0,102
3,7,1.0,103
5,9,0.5,104
8,7,5.0,105
"""
# mean ratings by hand; a row a user 3, 5, 8
BY_HAND = {
    "(no genres listed)": [1.0, 0.0, 5.0],
    "Adventure": [0.0, 4.0, 0.0],
    "Comedy": [3.5, 3.0, 0.0],
    "Drama": [3.5, 1.25, 0.0],
}


def written(folder, name, text, encoding="utf-8"):
    path = folder / name
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
@pytest.mark.parametrize("change", ["", "bom", "crlf", "no final newline"])
@pytest.mark.parametrize("keep_no_genres", [False, True])
def test_vectors_are_mean_ratings_by_genre(tmp_path, ending, change, keep_no_genres):
    texts = {"ratings": RATINGS, "movies": MOVIES}
    if change == "crlf":
        texts = {name: text.replace("\n", "\r\n") for name, text in texts.items()}
    if change == "no final newline":
        texts = {name: text.rstrip("\n") for name, text in texts.items()}
    encoding = "utf-8-sig" if change == "bom" else "utf-8"
    paths = [written(tmp_path, f"{name}.{ending}", text, encoding) for name, text in texts.items()]
    got = read_movielens(*paths, keep_no_genres=keep_no_genres)
    genres = [name for name in BY_HAND if keep_no_genres or not name.startswith("(")]
    assert got.user_ids.tolist() == ["3", "5", "8"]
    assert list(got.dimensions) == genres
    np.testing.assert_allclose(got.vectors, np.transpose([BY_HAND[name] for name in genres]))


def test_columns_in_another_order(tmp_path):
    shuffled = "\n".join(",".join(reversed(line.split(","))) for line in RATINGS.splitlines())
    got = read_movielens(written(tmp_path, "r.csv", shuffled), written(tmp_path, "m.csv", MOVIES))
    np.testing.assert_allclose(got.vectors, np.transpose([BY_HAND[name] for name in list(BY_HAND)[1:]]))


def test_the_data_in_the_repository():
    files = DATA / "ratings.csv.gz", DATA / "movies.csv.gz"
    default, paper = read_movielens(*files), read_movielens(*files, keep_no_genres=True)
    assert default.vectors.shape[1] == 19
    assert paper.vectors.shape[1] == 20
    assert set(paper.dimensions) - set(default.dimensions) == {"(no genres listed)"}
    assert (np.diff(default.user_ids.astype(int)) > 0).all()
    assert (default.vectors == 0).any()
    assert ((default.vectors == 0) | ((default.vectors >= 0.5) & (default.vectors <= 5))).all()
    # one user by a loop over the lines
    with gzip.open(DATA / "movies.csv.gz", "rt", encoding="utf-8") as file:
        genres = {line.split(",")[0]: line.rstrip("\n").rsplit(",", 1)[1].split("|") for line in file}
    with gzip.open(DATA / "ratings.csv.gz", "rt", encoding="utf-8") as file:
        rows = [line.split(",") for line in file if line.startswith("15,")]
    drama = [float(row[2]) for row in rows if "Drama" in genres[row[1]]]
    user, genre = default.user_ids.tolist().index("15"), default.dimensions.index("Drama")
    assert default.vectors[user, genre] == pytest.approx(np.mean(drama))


@pytest.mark.parametrize(
    "line, told",
    [
        ("5,9,good,1", "line 8: rating 'good' is not a number"),
        ("5,7,,1", "line 8: rating '' is not a number"),
        ("5,7,nan,1", "line 8: rating 'nan' is not a number"),
        ("5,7,5.5,1", "line 8: rating 5.5 is not within 0.5 to 5"),
        ("5,7,0,1", "line 8: rating 0 is not within 0.5 to 5"),
        ("5,7,-3,1", "line 8: rating -3 is not within"),
        ("5,1,4.0,100", "line 8: user 5 rates movie 1 a second time"),
        ("5,1234,4.0,100", "line 8: movie 1234 is not in"),
        (",1,4.0,100", "line 8: userId is missing"),
        ("3,1,4,5,100", "line 8: 5 fields where the header has 4"),
        ("5.0,7,4,100", "users 5 and 5.0 stand in one file"),
        ("5,99999999999999999999,4,100", "line 8: movieId '99999999999999999999' is too large"),
        ("5,x,4.0,100", "line 8: movieId 'x' is not a whole number"),
        ("5,1.5,4.0,100", "line 8: movieId '1.5' is not a whole number"),
    ],
)
def test_bad_ratings_name_file_and_line(tmp_path, line, told):
    ratings, movies = written(tmp_path, "r.csv", RATINGS + line + "\n"), written(tmp_path, "m.csv", MOVIES)
    with pytest.raises(InputError, match=r"r\.csv") as caught:
        read_movielens(ratings, movies)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["ratings", "movies"])
@pytest.mark.parametrize(
    "change, told",
    [
        (lambda text: "", "the file is empty"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: text.replace("movieId", "film", 1), "no column movieId"),
        (lambda text: None, "no such file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, change, told):
    texts = {"ratings": RATINGS, "movies": MOVIES}
    changed = change(texts[name])
    paths = {key: written(tmp_path, f"{key}.csv", text) for key, text in texts.items()}
    if changed is None:
        paths[name].unlink()
    else:
        paths[name].write_text(changed, encoding="utf-8")
    with pytest.raises(InputError, match=f"{name}.csv.*{told}"):
        read_movielens(paths["ratings"], paths["movies"])


def test_bad_movies(tmp_path):
    ratings = written(tmp_path, "r.csv", RATINGS)
    with pytest.raises(InputError, match="movie 1 stands twice"):
        read_movielens(ratings, written(tmp_path, "m.csv", MOVIES + "1,Again,Drama\n"))
    with pytest.raises(InputError, match="no movie has a genre"):
        text = re.sub(r",[^,]*$", ",(no genres listed)", MOVIES.partition("\n")[2], flags=re.M)
        read_movielens(ratings, written(tmp_path, "m.csv", "movieId,title,genres\n" + text.rstrip("\n,") + "\n"))


def test_broken_compression(tmp_path):
    movies = written(tmp_path, "m.csv", MOVIES)
    whole = gzip.compress((RATINGS * 50).encode(), mtime=0)
    for content in (RATINGS.encode(), whole[: len(whole) // 2], whole[:40] + b"\0\0\0\0\0\0" + whole[46:]):
        path = tmp_path / "r.csv.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"r\.csv\.gz: cannot be read"):
            read_movielens(path, movies)


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_a_matrix_as_it_stands(tmp_path, name):
    got = read_matrix(written(tmp_path, name, "who,taste a,b\nann,1.5,-2\nbob,0,3e1\n", "utf-8-sig"))
    assert got.user_ids.tolist() == ["ann", "bob"]
    assert got.dimensions == ("taste a", "b")
    np.testing.assert_array_equal(got.vectors, [[1.5, -2], [0, 30]])


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "the file is empty"),
        ("user\n1\n2\n", "needs the user id and at least one dimension"),
        ("user,a,b\n1,2,3\n2,,3\n", "line 3: column a: '' is not a finite number"),
        ("user,a,b\n1,2,3\n2,4,nan\n", "line 3: column b: 'nan' is not a finite number"),
        ("user,a,b\n1,2,inf\n2,4,1\n", "line 2: column b: 'inf' is not a finite number"),
        ("user,a,b\n1,2,x\n2,4,1\n", "line 2: column b: 'x' is not a finite number"),
        ("user,a,b\n1,2,1\n1,4,1\n", "line 3: the user id is"),
        ("user,a,b\n1,2,1\n,4,1\n", "line 3: the user id is"),
        # What would else be read, and wrong:
        ('"a","b"\n"u",1,2\n', "the first row has 3 fields where the header has 2"),  # R's write.table
        ("who,a,b\nu,1,5,2\n", "the first row has 4 fields where the header has 3"),  # a decimal comma
        ("who,a,b\nu,1,2\n\nv,2,5,3\n", "line 4: 4 fields where the header has 3"),
        ("who;a\nu;1,5\n", "the first row has 2 fields .* separated by semicolons"),
        ("u,0.5,1\nv,1,2\n", "line 1 is no header: it holds the number 0.5"),
        ("u,3,1\nv,1,2\n", "line 1 is no header: it holds the number 3"),
        (",userId,a\n0,17,1\n1,18,2\n", "column userId is no dimension"),
        ("who,a,a \nu,1,2\n", "column a stands twice"),
        ("who,a,,b\nu,1,5,2\n", "a column has no name"),
        ("who,a\nann,1\nann ,2\n", "line 3: the user id is a repeated one"),
        ("who,a\n5,1\n5.0,2\n", "users 5 and 5.0 stand in one file"),
        ('who,a,b\n"u,1,2\nv,1,2\nw"x,2,3\ny,1,1\n', "line 2: cannot be read as CSV"),
        ("who,a\nu,True\nv,False\n", "line 2: column a: 'True' is not a finite number"),
        ("who,a\nu,1e71\nv,1\n", "line 2: column a: '1e71' is too large"),
    ],
)
def test_bad_matrices(tmp_path, text, told):
    with pytest.raises(InputError, match=f"x.csv: {told}"):
        read_matrix(written(tmp_path, "x.csv", text))


@pytest.mark.parametrize(
    "text, ids",
    [
        ("who,a\n0001,1\n1,2\n01,3\n", ["0001", "1", "01"]),
        ("who,a\n1e5,1\n10e4,2\n3e7,3\n", ["1e5", "10e4", "3e7"]),
        ("who,a\nAB,1\nNA,2\nnan,3\n", ["AB", "NA", "nan"]),
        ("who , a\nann ,1\n bob, 2\nann bob,3\n", ["ann", "bob", "ann bob"]),
        ("who,a\n1.0,1\n2.0,2\n99999999999999999999,3\n", ["1.0", "2.0", "99999999999999999999"]),
        (",a\n0,1\n1,2\n2,3\n", ["0", "1", "2"]),  # a pandas index
        ('"","a"\n"1",1\n"2",2\n"3",3\n', ["1", "2", "3"]),  # R's write.csv
    ],
)
def test_ids_are_text_as_written(tmp_path, text, ids):
    got = read_matrix(written(tmp_path, "x.csv", text))
    assert got.user_ids.tolist() == ids
    assert got.dimensions == ("a",)
    np.testing.assert_array_equal(got.vectors[:, 0], [1, 2, 3])


def test_a_pipe_which_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot be read as CSV"):
        read_matrix(tmp_path / "pipe")


def test_columns_may_be_named_by_numbers_that_count(tmp_path):
    assert read_matrix(written(tmp_path, "x.csv", "who,0,1\nu,1,2\n")).dimensions == ("0", "1")
    assert read_matrix(written(tmp_path, "x.csv", ",2019,2021\nu,1,2\n")).dimensions == ("2019", "2021")


@pytest.mark.parametrize(
    "ratings", [RATINGS, RATINGS.replace(",", " , "), re.sub(r"(\d+),(\d+),", r"\1.0,\2.0,", RATINGS)]
)
def test_ids_as_floats_and_spaces(tmp_path, ratings):
    got = read_movielens(written(tmp_path, "r.csv", ratings), written(tmp_path, "m.csv", MOVIES.replace("|", " | ")))
    assert [user.removesuffix(".0") for user in got.user_ids] == ["3", "5", "8"]
    np.testing.assert_allclose(got.vectors, np.transpose([BY_HAND[name] for name in list(BY_HAND)[1:]]))


def test_users_of_ratings_come_by_number_then_as_text(tmp_path):
    users = ("10", 1), ("b", 2), ("9", 3), ("09", 4), ("a", 5), ("9" * 5000, 0.5)
    rows = "\n".join(f"{user},1,{rating}" for user, rating in users)
    ratings = written(tmp_path, "r.csv", "userId,movieId,rating\n" + rows + "\n")
    got = read_movielens(ratings, written(tmp_path, "m.csv", "movieId,genres\n1,Drama\n"))
    assert got.user_ids.tolist() == ["09", "9", "10", "9" * 5000, "a", "b"]
    np.testing.assert_array_equal(got.vectors[:, 0], [4, 3, 1, 0.5, 5, 2])


TEN = Preferences(np.arange(10) * 11, ("a", "b"), np.arange(20.0).reshape(10, 2))


def seeds(count, seed=0):
    return [np.random.SeedSequence(seed, spawn_key=(run,)) for run in range(count)]


@pytest.mark.parametrize("first_users, pool", [(True, 5), (False, 10)])
def test_crowds(first_users, pool):
    crowd = draw_crowds(TEN, 4, seeds(300), first_users=first_users)
    assert crowd.users.shape == (300, 4, 2)
    row_of = {tuple(vector): user for user, vector in zip(TEN.user_ids.tolist(), TEN.vectors.tolist(), strict=True)}
    experts = [row_of[tuple(expert)] for expert in crowd.experts.tolist()]
    for run in range(300):
        ids = crowd.user_ids[run].tolist()
        assert experts[run] not in ids
        assert len(set(ids)) == 4
        assert [row_of[tuple(vector)] for vector in crowd.users[run].tolist()] == ids
    everyone = set(experts) | set(crowd.user_ids.ravel().tolist())
    assert everyone == set(TEN.user_ids[:pool].tolist())
    counts = np.bincount(np.array(experts) // 11, minlength=10)[:pool]
    assert np.abs(counts - 300 / pool).max() < 5 * (300 / pool) ** 0.5
    assert ((crowd.models >= 0) & (crowd.models <= 5)).all()
    assert abs(crowd.models.mean() - 2.5) < 0.3


def test_a_run_keeps_its_crowd_whatever_runs_beside_it():
    many, one = draw_crowds(TEN, 4, seeds(5)), draw_crowds(TEN, 4, seeds(5)[3:4])
    for name, field in vars(one).items():
        np.testing.assert_array_equal(field[0], vars(many)[name][3])


def test_too_few_users():
    assert draw_crowds(TEN, 9, seeds(1)).users.shape == (1, 9, 2)
    with pytest.raises(InputError, match="10 users: the data hold 10 users"):
        draw_crowds(TEN, 10, seeds(1))


# ------------------------------------------------------------------ the hull


TRIANGLE = np.array([[0.0, 0], [4, 0], [0, 4]])
TETRAHEDRON = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "users, expert, distance",
    [
        (TRIANGLE, [1, 1], 0),  # inside
        (TRIANGLE, [2, 2], 0),  # on an edge
        (TRIANGLE, [4, 0], 0),  # at a vertex
        (TRIANGLE, [-3, -4], 5),  # nearest: a vertex
        (TRIANGLE, [1, -2], 2),  # nearest: an edge
        (TRIANGLE, [4, 4], 8**0.5),  # nearest: the middle of the long edge
        (TETRAHEDRON, [0.1, 0.2, 0.3], 0),
        (TETRAHEDRON, [1, 1, 1], 2 / 3**0.5),  # nearest: a face
        (TETRAHEDRON, [0.2, 0.2, -7], 7),
        (np.array([[1.0, 2, 3]]), [1, 2, 5], 2),  # one user
        (np.array([[1.0, 2], [1, 2], [1, 2]]), [4, 6], 5),  # three equal users
        (np.array([[0.0, 0], [0, 0]]), [0, 0], 0),
        (np.array([[1.0], [3], [2]]), [2.5], 0),  # a line
        (np.array([[1.0], [3], [2]]), [7], 4),
        (np.array([[1.0]]), [1], 0),
    ],
)
def test_known_geometry(users, expert, distance):
    assert hull_distance(users, np.array(expert, dtype=float)) == pytest.approx(distance, abs=1e-9)


def nearest_mixture(users, expert):
    """By a general constrained optimiser, from several starts."""
    n = len(users)

    def squared(w):
        miss = w @ users - expert
        return miss @ miss, 2 * users @ miss

    bounds, total = [(0, 1)] * n, {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)}
    starts = np.vstack([np.full(n, 1 / n), np.random.default_rng(0).dirichlet(np.ones(n), 2)])
    options = {"ftol": 1e-15, "maxiter": 500}
    found = [
        minimize(squared, w, jac=True, bounds=bounds, constraints=total, options=options, method="SLSQP")
        for w in starts
    ]
    return min(result.fun for result in found) ** 0.5


@pytest.mark.parametrize("seed", range(12))
def test_against_a_general_optimiser(seed):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(2, 9), rng.integers(1, 6)
    users, expert = rng.normal(size=(n, d)), rng.normal(size=d) * 1.5
    assert hull_distance(users, expert) == pytest.approx(nearest_mixture(users, expert), abs=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_many_users_agree_with_optimality(seed):
    """More users than the working set starts with. The nearest mixture is certified: by linear programming it is
    inside exactly where the distance is 0, and no direction of a user comes closer by more than the tolerance."""
    rng = np.random.default_rng(seed)
    users = rng.normal(size=(700, 6))
    inside = users[:50].mean(axis=0)
    outside = np.r_[4.0, rng.normal(size=5)]
    for expert in (inside, outside):
        distance = hull_distance(users, expert)
        feasible = linprog(
            np.zeros(700), A_eq=np.vstack([users.T, np.ones(700)]), b_eq=np.r_[expert, 1], bounds=(0, None)
        )
        assert (distance < 1e-6) == (feasible.status == 0)
        # all users at once, by Frank-Wolfe's own bound: a point at `distance` has a separating plane there
        full = hull_distance(users[np.argsort(users @ rng.normal(size=6))], expert)
        assert full == pytest.approx(distance, abs=1e-7)
        for subset in np.array_split(rng.permutation(700), 4):
            assert hull_distance(users[subset], expert) >= distance - 1e-7


def test_shifts_and_scales_with_the_space():
    rng = np.random.default_rng(0)
    users, expert = rng.uniform(0, 5, (75, 19)), rng.uniform(0, 5, 19)
    distance = hull_distance(users, expert)
    assert hull_distance(users + 3, expert + 3) == pytest.approx(distance, rel=1e-6)
    assert hull_distance(users * 10, expert * 10) == pytest.approx(10 * distance, rel=1e-6)
    assert 0 < distance <= np.linalg.norm(users - expert, axis=1).min()
    assert distance <= np.linalg.norm(users.mean(axis=0) - expert)
