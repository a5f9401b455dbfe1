"""What the command line of an experiment that tunes models can set of how they are tuned and sampled.

Nothing here imports torch, which the options' help does not need.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from experiment.command_line import CommonSettings, check_range
from experiment.errors import InputError
from point_in_space_sim.engine.settings import PROMPT, SamplingSettings, TuningSettings


@dataclass(frozen=True)
class EngineOptions(CommonSettings):
    base_model: str = "smollm2-135m"
    """smollm2-135m (fetched once), a folder, or a Hugging Face id of a causal language model."""
    mapper: str = "embedded"
    """embedded, roberta (SamLowe/roberta-base-go_emotions, the study's), a Hugging Face id, or a folder."""
    prompt: str = PROMPT
    """What the models are asked, before every text."""
    layers: int = TuningSettings.layers
    """Upper decoder layers that are tuned. This default and those down to --max-new-tokens are the hyperparameter
    study's choice."""
    rank: int = TuningSettings.rank
    """Rank of the LoRA adapters."""
    learning_rate: float = TuningSettings.learning_rate
    """AdamW's learning rate at the start; it falls linearly to zero."""
    epochs: int = TuningSettings.epochs
    """Times that a variant sees each of its texts."""
    batch_size: int = TuningSettings.batch_size
    """Texts a step of tuning."""
    temperature: float = SamplingSettings.temperature
    """Of sampling."""
    top_p: float = SamplingSettings.top_p
    """Sampling draws from the likeliest tokens that together have this probability."""
    max_new_tokens: int = SamplingSettings.max_new_tokens
    """Longest text, in tokens."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N; auto is CUDA where it is available."""


def check_engine_options(options: EngineOptions) -> None:
    """Raises InputError for options with which nothing can be tuned or sampled."""
    if not options.prompt.strip():
        raise InputError("--prompt: is empty")
    for name in ("layers", "rank", "epochs", "batch_size", "max_new_tokens"):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), 1, 10**6)
    for name, high in (("learning_rate", 1.0), ("temperature", 100.0), ("top_p", 1.0)):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), 0, high, open_low=True)


def engine_settings(
    options: EngineOptions, method: Literal["lora", "full"] = "lora"
) -> tuple[TuningSettings, SamplingSettings]:
    def given(settings: type) -> dict[str, Any]:
        return {field.name: getattr(options, field.name) for field in fields(settings) if field.name != "method"}

    return TuningSettings(method=method, **given(TuningSettings)), SamplingSettings(**given(SamplingSettings))
