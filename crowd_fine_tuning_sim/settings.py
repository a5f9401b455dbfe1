"""The options of run.py, its presets, and what they must be."""

from dataclasses import dataclass
from typing import Any, Literal

from experiment.command_line import check_common, check_name, check_range
from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.options import EngineOptions, check_engine_options
from user_grouping_evaluation_sim.settings import check_strategies

KINDS = ("on", "half", "random", "off", "copyist", "spammer", "turncoat")
MOST_USERS_EXACT = 8


@dataclass(frozen=True)
class Settings(EngineOptions):
    crowd: str = "shipped"
    """shipped (simulated people, data/comments), chitchat (real people, fetched once), or a .csv, .tsv or .jsonl file
    with a user and a text column."""
    user_column: str = "user"
    """Of the file: who wrote a text."""
    text_column: str = "text"
    """Of the file: the text; essays are cut into pieces of up to 40 words at sentence ends."""
    kinds: tuple[str, ...] = ("on", "on", "on", "half", "random", "off")
    """Of simulated people, in turn: on, half, random, off target, copyist (of the first on target; several are a
    sybil's accounts), spammer, turncoat (on target in the first 40 % of the rounds, then off)."""
    target_emotion: tuple[str, ...] = ("joy",)
    """GoEmotions labels; each is a target with crowds of its own."""
    num_crowds: int = 1
    """Crowds a target."""
    num_seeds: int = 1
    """How often a crowd is tuned and judged anew; --seed is the first seed, the others follow it."""
    num_users: int = 6
    """People in a crowd."""
    texts_per_user: int = 6
    """Texts that each of them holds."""
    neighbours: int = 100
    """Texts nearest to the target, held by nobody, whose mean the crowd is to reach."""
    num_groups: int = 2
    """Groups a round; each tunes a variant."""
    num_rounds: int = 8
    """Rounds of the competition."""
    budget: int = 12
    """Texts that a variant is tuned on in a round, drawn by its members' weights."""
    error_probability: float = 0.0
    """Probability that a round takes a random candidate that is not the best, in [0, 1]."""
    grouping: tuple[str, ...] = ("random",)
    """Who works together: see user_grouping_evaluation_sim/grouping.py, or module:function."""
    metric: tuple[str, ...] = ("l2",)
    """How a sample's mean vector is valued: see user_grouping_evaluation_sim/metrics.py, or module:function."""
    scoring: tuple[str, ...] = ("marginal", "ranked", "attributed")
    """What people earn: see user_grouping_evaluation_sim/scoring.py, or module:function."""
    reference: Literal["exact", "sampled", "none"] = "exact"
    """Shapley values by retraining: on all coalitions (up to 8 people), on some, or not at all."""
    retrainings: int = 64
    """With --reference sampled: how many coalitions."""
    anonymous: bool = False
    """Number the people in all results, instead of the names that the source gives."""
    samples: int = 12
    """Texts sampled from a model to judge it."""
    redo_tables: bool = False
    """Write the tables, figures and report of a finished run again, from its cases/."""


# Twice the default's texts and samples, whose halves tell people apart at r = 0.91 and 0.94 (FINDINGS.md).
REFERENCE_SIZE = {"texts_per_user": 12, "num_rounds": 12, "budget": 16, "samples": 24}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        "num_users": 3,
        "kinds": ("on", "half", "off"),
        "texts_per_user": 4,
        "num_rounds": 2,
        "budget": 4,
        "samples": 4,
        "epochs": 1,
        "max_new_tokens": 16,
        "scoring": ("marginal", "attributed"),
    },
    "reference": {
        **REFERENCE_SIZE,
        "target_emotion": ("joy", "fear", "gratitude"),
        "num_crowds": 2,
        "num_seeds": 2,
        "seed": 30,
    },
    "people": {
        **REFERENCE_SIZE,
        "crowd": "chitchat",
        "target_emotion": ("curiosity", "admiration", "amusement", "love"),
        "num_seeds": 2,
        "seed": 40,
        "anonymous": True,
    },
    "eight": {
        **REFERENCE_SIZE,
        "num_users": 8,
        "kinds": ("on", "on", "half", "half", "random", "off", "copyist", "spammer"),
        "num_seeds": 2,
        "seed": 60,
    },
}


def check_settings(settings: Settings) -> None:
    """Raises InputError for settings that no run can have."""
    check_common(settings)
    check_strategies(settings)
    if not settings.target_emotion or len(set(settings.target_emotion)) < len(settings.target_emotion):
        raise InputError("--target-emotion: name at least one emotion, and each once")
    for emotion in settings.target_emotion:
        check_name("--target-emotion", emotion, EMOTIONS)
    if not settings.kinds:
        raise InputError(f"--kinds: name at least one of {', '.join(KINDS)}")
    for kind in settings.kinds:
        check_name("--kinds", kind, KINDS)
    check_range("--num-users", settings.num_users, 2, 10**6)
    check_range("--num-groups", settings.num_groups, 1, settings.num_users)
    check_range("--error-probability", settings.error_probability, 0, 1)
    check_range("--neighbours", settings.neighbours, 3, 10**6)
    check_range("--samples", settings.samples, 2, 10**6)
    for name in ("num_crowds", "num_seeds", "texts_per_user", "num_rounds", "budget"):
        check_range(f"--{name.replace('_', '-')}", getattr(settings, name), 1, 10**6)
    check_engine_options(settings)
    if settings.redo_tables and settings.overwrite:
        raise InputError("--redo-tables: goes on from what --overwrite removes; choose one")
    if settings.reference == "exact" and settings.num_users > MOST_USERS_EXACT:
        raise InputError(
            f"--reference exact: {settings.num_users} people have 2^{settings.num_users} coalitions, each a model to "
            f"tune; choose sampled, or at most {MOST_USERS_EXACT} people"
        )
    if settings.reference == "sampled":
        check_range("--retrainings", settings.retrainings, settings.num_users + 2, 10**6)
        if len(settings.metric) > 1:
            raise InputError("--reference sampled: which coalitions are retrained depends on the metric; name one")


def retrained_coalitions(settings: Settings) -> int:
    """Of one repetition, the empty one among them."""
    return {"exact": 2**settings.num_users, "sampled": settings.retrainings, "none": 0}[settings.reference]


def kinds_of(settings: Settings) -> list[str]:
    """A kind for each of the simulated people: --kinds, begun again where it is too short."""
    return [settings.kinds[i % len(settings.kinds)] for i in range(settings.num_users)]
