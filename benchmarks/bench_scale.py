"""100,000 users in 100 groups, and how time grows with users; a ratings file of 5 million rows.

The alternative to our reader: merge, explode and pivot in pandas.
Run: python benchmarks/bench_scale.py
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.measure import report, run_process
from user_grouping_evaluation_sim.preferences import read_movielens
from user_grouping_evaluation_sim.settings import DATA

SCRIPT = "user_grouping_evaluation_sim/run.py"
READ = "from user_grouping_evaluation_sim.preferences import read_movielens; import sys; read_movielens(*sys.argv[1:])"
READ_BY_PANDAS = """
import sys, pandas as pd
ratings, movies = map(pd.read_csv, sys.argv[1:])
genres = movies.assign(genre=movies.genres.str.split("|")).explode("genre")[["movieId", "genre"]]
joined = ratings[["userId", "movieId", "rating"]].merge(genres, on="movieId")
joined.pivot_table(index="userId", columns="genre", values="rating", aggfunc="mean").fillna(0)
"""


def write_crowd(path: Path, vectors: np.ndarray, users: int) -> None:
    """`users` users drawn from the real ones, each moved a little, as a matrix file."""
    rng = np.random.default_rng(0)
    rows = np.clip(
        vectors[rng.integers(len(vectors), size=users)] + rng.normal(0, 0.2, (users, vectors.shape[1])), 0, 5
    )
    frame = pd.DataFrame(rows.round(3), columns=[f"dimension_{i}" for i in range(vectors.shape[1])])
    frame.insert(0, "user", np.arange(users))
    frame.to_csv(path, index=False)


def main() -> None:
    vectors = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz").vectors
    with tempfile.TemporaryDirectory() as folder:
        for scoring, bar in (("marginal", "60"), ("attributed", "120")):
            took = {}
            for users in (25_000, 50_000, 100_000):
                path = Path(folder) / f"{users}.csv"
                if not path.exists():
                    write_crowd(path, vectors, users + 1)
                common = [
                    "--preferences",
                    str(path),
                    "--num-users",
                    str(users),
                    "--num-groups",
                    "100",
                    "--num-runs",
                    "1",
                ]
                options = ["--grouping", "epsilon_greedy", "--metric", "l2", "--scoring", scoring, "--shapley", "none"]
                out = ["--jobs", "1", "--output-dir", f"{folder}/{scoring}{users}"]
                took[users], memory, _ = run_process([SCRIPT, *common, *options, *out])
            report(f"{scoring}, 100,000 users, 100 groups, 100 rounds: wall", took[100_000], "s", bar)
            report(f"{scoring}, 100,000 users: peak memory", memory, "MB", "2000")
            slope = np.polyfit(np.log(list(took)), np.log(list(took.values())), 1)[0]
            report(f"{scoring}, 25,000 to 100,000 users: time grows as users to the power", slope, "", "1")
        rng = np.random.default_rng(1)
        movies = pd.read_csv(DATA / "movies.csv.gz")
        cells = rng.choice(60_000 * len(movies), size=5_200_000)
        cells = np.unique(cells)[:5_000_000]
        ratings = pd.DataFrame(
            {"userId": cells // len(movies) + 1, "movieId": movies["movieId"].to_numpy()[cells % len(movies)]}
        )
        ratings["rating"] = rng.integers(1, 11, len(ratings)) / 2
        ratings["timestamp"] = rng.integers(10**9, 2 * 10**9, len(ratings))
        path = Path(folder) / "ratings.csv"
        ratings.to_csv(path, index=False)
        files = [str(path), str(DATA / "movies.csv.gz")]
        seconds, memory, _ = run_process(["-c", READ, *files])
        other, other_memory, _ = run_process(["-c", READ_BY_PANDAS, *files])
        report(f"reading {len(ratings):,} ratings: wall", seconds, "s", "15", other, "pandas merge and pivot")
        report(f"reading {len(ratings):,} ratings: peak memory", memory, "MB", "1500", other_memory, "pandas")


if __name__ == "__main__":
    main()
