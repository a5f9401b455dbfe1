"""How models are tuned and how comments are drawn. The defaults were chosen by study_hyperparameters.py."""

from dataclasses import dataclass
from typing import Literal

PROMPT = "Write a Reddit comment."


@dataclass(frozen=True)
class TuningSettings:
    """How a variant is tuned. The defaults were chosen by study_hyperparameters.py."""

    method: Literal["lora", "full"] = "lora"
    layers: int = 20  # how many of the upper decoder layers are tuned; at most the model's own number
    rank: int = 16  # of the LoRA factors; their product is scaled by lora_alpha / rank = 2
    learning_rate: float = 4e-3
    epochs: int = 3
    batch_size: int = 8  # comments a step


@dataclass(frozen=True)
class SamplingSettings:
    """How comments are drawn."""

    temperature: float = 0.7  # divides the logits
    top_p: float = 0.9  # draw from the likeliest tokens that together hold this probability
    max_new_tokens: int = 48
