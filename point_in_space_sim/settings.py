"""What the command line can set, how models are tuned and sampled, the presets, and which settings no run can have."""

from dataclasses import dataclass
from typing import Any, Literal

from experiment.command_line import check_common, check_name, check_range, naming
from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.options import EngineOptions, check_engine_options
from point_in_space_sim.protocols import ALWAYS, PROTOCOLS
from point_in_space_sim.target import parse_mixture, part_sizes


@dataclass(frozen=True)
class Settings(EngineOptions):
    emotions: tuple[str, ...] = ("joy",)
    """GoEmotions labels, or all. A target is the comment that scores highest on the emotion."""
    target_text: str | None = None
    """In place of --emotions: a text of your own as the target."""
    target_emotions: str | None = None
    """In place of --emotions: a point in emotion space, such as joy=0.7,gratitude=0.3 (all others 0)."""
    num_seeds: int = 1
    """How often everything is repeated; --seed is the first seed, the others follow it."""
    corpus: str = "shipped"
    """shipped (data/comments), a GoEmotions TSV, a CSV with a column text, or go_emotions (from the hub)."""
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    """Which are played; base, single and multi always are."""
    choose_by: Literal["centroid", "target"] = "centroid"
    """A variant is kept that lies nearest to the neighbourhood's centroid, or to the target (the study's choice)."""
    contamination: float = 0.0
    """Above 0, the pool belongs to users, and this share of them writes off target, near other emotions."""
    deal: Literal["comment", "user"] = "comment"
    """What is dealt to the variants: comments, or users with all of theirs."""
    num_users: int = 12
    """How many users share the neighbourhood, where there are users (--contamination or --deal user)."""
    neighbours: int = 100
    """How many comments nearest to the target make its neighbourhood."""
    generations: int = 3
    """Generations of the competition."""
    variants: int = 3
    """Variants a generation."""
    samples: int = 50
    """Comments sampled from a model."""
    tuning: Literal["lora", "full"] = "lora"
    """LoRA adapters or all weights of the tuned layers."""


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # In one process: to start others would take longer than they would save.
    "quick": {
        "generations": 1,
        "variants": 2,
        "neighbours": 24,
        "samples": 8,
        "epochs": 2,
        "max_new_tokens": 24,
        "jobs": 1,
    },
    # On seeds that fixed no rule and no setting. Averages are left out: they cost as much as a competition.
    "reference": {
        "emotions": ("all",),
        "seed": 10,
        "num_seeds": 2,
        "protocols": tuple(name for name in PROTOCOLS if name != "averaged"),
    },
    "all": {"emotions": ("all",)},
}


def check_settings(settings: Settings) -> None:
    """Raises InputError for settings that no run can have."""
    check_common(settings)
    for name in ("num_seeds", "generations"):
        check_range(f"--{name.replace('_', '-')}", getattr(settings, name), 1, 10**6)
    check_range("--samples", settings.samples, 2, 10**6)  # one has no interval
    check_range("--variants", settings.variants, 2, 10**6)
    check_range("--neighbours", settings.neighbours, 3, 10**6)
    check_engine_options(settings)
    if not settings.emotions:
        raise InputError("--emotions: name at least one emotion, or all")
    for emotion in settings.emotions:
        check_name("--emotions", emotion, [*EMOTIONS, "all"])
    if settings.target_text is not None and settings.target_emotions is not None:
        raise InputError("--target-text and --target-emotions: give one of them")
    if settings.target_text is not None and not settings.target_text.strip():
        raise InputError("--target-text: is empty")
    for name in settings.protocols:
        check_name("--protocols", name, PROTOCOLS)
    if settings.target_emotions is not None:
        with naming(f"--target-emotions {settings.target_emotions!r}"):
            parse_mixture(settings.target_emotions)
    check_range("--contamination", settings.contamination, 0, 1)
    if has_users(settings):
        check_range("--num-users", settings.num_users, 1, settings.neighbours)
    if round(settings.contamination * settings.num_users) >= settings.num_users:
        raise InputError(f"--contamination {settings.contamination:g}: leaves no user on target; choose less")
    by_user = settings.deal == "user"
    with naming(f"--num-users {settings.num_users}" if by_user else f"--neighbours {settings.neighbours}"):
        held = settings.neighbours // settings.num_users * settings.num_users if has_users(settings) else None
        units = settings.num_users if by_user else held or settings.neighbours
        part_sizes(units, settings.generations, settings.variants)


def has_users(settings: Settings) -> bool:
    return settings.deal == "user" or settings.contamination > 0


def played(settings: Settings) -> tuple[str, ...]:
    """The protocols asked for, in the registry's order. Where nobody is off target, the oracle is the single model."""
    asked = [name for name in settings.protocols if name != "oracle" or settings.contamination > 0]
    return tuple(name for name in PROTOCOLS if name in asked or name in ALWAYS)


def target_names(settings: Settings) -> list[str]:
    """The targets asked for, emotions in GoEmotions order."""
    if settings.target_text is not None:
        return [f'"{settings.target_text}"']
    if settings.target_emotions is not None:
        return [settings.target_emotions]
    return [emotion for emotion in EMOTIONS if {emotion, "all"} & set(settings.emotions)]
