"""Where the models are to go: a target point in emotion space, its neighbourhood of comments, their centroid."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiment.command_line import check_name
from experiment.errors import InputError
from experiment.run_folder import hash_of
from point_in_space_sim.corpus import EMOTIONS

THIRDS = 3
"""The single model is tuned on one, two and three thirds of the neighbourhood (33, 66 and 100 comments)."""


@dataclass(frozen=True)
class Target:
    """A point in emotion space. `comment` is its index in the corpus, None where it is no comment of the corpus."""

    name: str
    vector: np.ndarray  # (28,)
    comment: int | None = None


@dataclass(frozen=True)
class Neighbourhood:
    """The comments nearest to a target."""

    target: Target
    members: np.ndarray  # (k,) indices in the corpus, nearest to the target first
    centroid: np.ndarray  # (28,), the members' mean vector
    distances: np.ndarray  # (k,), each member's distance to the centroid


def emotion_target(emotion: str, vectors: np.ndarray) -> Target:
    """The comment that scores highest on the emotion; vectors: (comments, 28)."""
    check_name("emotion", emotion, EMOTIONS)
    comment = int(np.argmax(vectors[:, EMOTIONS.index(emotion)]))
    return Target(emotion, vectors[comment], comment)


def text_target(text: str, vector: np.ndarray, texts: Sequence[str]) -> Target:
    """A text of the user's own at its vector (28,); where the corpus holds that text, it is that comment."""
    return Target(f'"{text}"', vector, texts.index(text) if text in texts else None)


def mixture_target(weights: dict[str, float]) -> Target:
    """The point with the given probabilities and zero for every other emotion."""
    vector = np.zeros(len(EMOTIONS), dtype=np.float32)
    for emotion, weight in weights.items():
        vector[EMOTIONS.index(emotion)] = weight
    return Target(
        ",".join(f"{emotion}={np.format_float_positional(weight, trim='-')}" for emotion, weight in weights.items()),
        vector,
    )


def parse_mixture(text: str) -> dict[str, float]:
    """ "joy=0.7,gratitude=0.3" -> {"joy": 0.7, "gratitude": 0.3}. Raises InputError for anything else."""
    weights: dict[str, float] = {}
    for entry in text.split(","):
        emotion, _, number = (field.strip() for field in entry.partition("="))
        try:
            weight = float(number)
        except ValueError:
            raise InputError(f"{entry.strip()!r} is not EMOTION=PROBABILITY; write joy=0.7,gratitude=0.3") from None
        check_name("emotion", emotion, EMOTIONS)
        if not 0 < weight <= 1 or emotion in weights:
            raise InputError("name every emotion once, with a probability above 0 and at most 1")
        weights[emotion] = weight
    return weights


def slug(target: str) -> str:
    """A target's name as a file name; two targets never share one."""
    words = re.sub("[^a-z0-9]+", "-", target.lower()).strip("-")[:40]
    return target if target in EMOTIONS else f"{words}-{hash_of(target)[:6]}"


def find_neighbourhood(target: Target, vectors: np.ndarray, size: int) -> Neighbourhood:
    """The `size` comments nearest to the target by L2, the target itself left out; of equals, the first in the corpus.

    vectors: (comments, 28). Raises InputError where the corpus has too few comments.
    """
    available = len(vectors) - (target.comment is not None)
    if size > available:
        raise InputError(f"the corpus has {available} comments beside the target; choose fewer, or a larger corpus")
    to_target = distances_to(target.vector, vectors)
    if target.comment is not None:
        to_target[target.comment] = np.inf
    members = np.argsort(to_target, kind="stable")[:size]
    centroid = vectors[members].astype(np.float64).mean(axis=0)
    return Neighbourhood(target, members, centroid, distances_to(centroid, vectors[members]))


def distances_to(point: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """L2 distance of each vector (n, 28) to the point (28,): (n,), double precision."""
    return np.linalg.norm(vectors.astype(np.float64) - point.astype(np.float64), axis=1)


def single_sizes(neighbours: int) -> list[int]:
    """How many comments the single models are tuned on: 33, 66 and 100 of 100."""
    return [neighbours * third // THIRDS for third in range(1, THIRDS + 1)]


def part_sizes(neighbours: int, generations: int, variants: int) -> list[int]:
    """How many comments (or users) a variant is tuned on in each generation: 33, 22 and 15 of 100 with three variants.

    Raises InputError where a generation would have fewer left than variants.
    """
    sizes, pool = [], neighbours
    for generation in range(1, generations + 1):
        if pool < variants:
            raise InputError(
                f"too few for {variants} variants and {generations} generations "
                f"({pool} are left for generation {generation}); choose more, or fewer generations"
            )
        sizes.append(pool // variants)
        pool -= sizes[-1]
    return sizes
