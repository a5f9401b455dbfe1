"""The pool: whose comments a game tunes on, and in which units they are dealt.

By default it is the neighbourhood, dealt comment by comment. With users, each holds as many comments of the
neighbourhood, and a share of them writes off target: near another emotion, each near another one while there are any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import Texts
from point_in_space_sim.target import Neighbourhood, distances_to, emotion_target

Units = tuple[Texts, ...]
Deal = Literal["comment", "user"]


@dataclass(frozen=True)
class User:
    """Who writes how: `writes` is the target's name, or the emotion that comments off target are near."""

    writes: str
    on_target: bool
    members: np.ndarray  # indices in the corpus


@dataclass(frozen=True)
class Pool:
    """texts: all of the pool, nearest to the target first. on_target: those of users on target, in that order.

    units: what is dealt, a comment or a user's comments each.
    """

    texts: Texts
    on_target: Texts
    units: Units
    users: tuple[User, ...] = ()


def neighbourhood_pool(neighbourhood: Neighbourhood, texts: Sequence[str]) -> Pool:
    """The neighbourhood, comment by comment. texts: the corpus's."""
    members = tuple(texts[i] for i in neighbourhood.members)
    return Pool(members, members, tuple((text,) for text in members))


def find_users(
    neighbourhood: Neighbourhood, vectors: np.ndarray, num_users: int, contamination: float, rng: np.random.Generator
) -> tuple[User, ...]:
    """num_users users with as many comments each, the share `contamination` of them, rounded, off target.

    vectors: (comments, 28), the corpus's. Of the same rng the users on target are the same for any contamination, but
    for those who write off target then. Nobody off target holds a comment of the neighbourhood or another's.
    Raises InputError where there are more users than comments, or too few comments that are off target.
    """
    size = len(neighbourhood.members) // num_users
    if size < 1:
        raise InputError(f"{num_users} users cannot share {len(neighbourhood.members)} comments; choose fewer users")
    target = neighbourhood.target
    dealt = rng.permutation(neighbourhood.members)
    others = [emotion for emotion in rng.permutation(list(EMOTIONS)).tolist() if emotion != target.name]
    off = round(contamination * num_users)
    users = [User(target.name, True, dealt[i * size : (i + 1) * size]) for i in range(num_users - off)]
    free = np.ones(len(vectors), dtype=bool)
    free[neighbourhood.members] = False
    if target.comment is not None:
        free[target.comment] = False
    if free.sum() < off * size:
        raise InputError(
            f"{off * size} comments are to be off target, the corpus has {free.sum()} beside the targets's"
        )
    for number in range(off):
        emotion = others[number % len(others)]
        distances = distances_to(emotion_target(emotion, vectors).vector, vectors)
        distances[~free] = np.inf
        members = np.argsort(distances, kind="stable")[:size]
        free[members] = False
        users.append(User(emotion, False, members))
    return tuple(users)


def users_pool(
    neighbourhood: Neighbourhood, vectors: np.ndarray, texts: Sequence[str], users: Sequence[User], deal: Deal
) -> Pool:
    """The users' comments, nearest to the target first, dealt by comment or by user. vectors, texts: the corpus's."""
    held = np.concatenate([user.members for user in users])
    held = held[np.argsort(distances_to(neighbourhood.target.vector, vectors[held]), kind="stable")]
    on_target = {int(i) for user in users if user.on_target for i in user.members}
    pool = tuple(texts[i] for i in held)
    units = [tuple(texts[i] for i in user.members) for user in users] if deal == "user" else [(text,) for text in pool]
    return Pool(pool, tuple(texts[i] for i in held if int(i) in on_target), tuple(units), tuple(users))
