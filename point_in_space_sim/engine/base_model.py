"""The causal language model that is tuned: SmolLM2-135M from a pinned wheel, a local folder, or any hub id."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from experiment.errors import InputError
from experiment.files import sha256_file
from point_in_space_sim.engine.assets import SMOLLM2_WHEEL, cache_folder, model_folder, new_cache_entry, wheel_folder
from point_in_space_sim.engine.settings import PROMPT

DEFAULT_BASE_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model in evaluation mode, with its tokenizer and where it came from."""

    name: str
    sha256: str  # of the weight file, or of the hashes of several
    folder: Path
    model: Any  # a transformers causal language model
    tokenizer: Any  # its tokenizer
    prompt_text: str = PROMPT  # what it is asked, before every comment

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens before a comment: the prompt in the tokenizer's chat template, or as a plain line without one."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(self.prompt_text + "\n")["input_ids"]
        message = [{"role": "user", "content": self.prompt_text}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def has_plain_layers(self) -> bool:
        """Whether running the decoder layers one by one gives the model's own logits, as for Llama-like models.

        Then tuning and sampling take the fast path; any other architecture runs through its own forward and generate.
        """
        tokens = torch.tensor([self.prompt], device=self.device)
        try:
            hidden = run_layers(self.model, self.model.model.embed_tokens(tokens), torch.arange(tokens.shape[1])[None])
            logits = self.model.lm_head(self.model.model.norm(hidden))
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
            return False
        with torch.no_grad():
            expected = self.model(tokens).logits
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def run_layers(
    model: Any,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    mask: torch.Tensor | None = None,
    cache: Any = None,
) -> torch.Tensor:
    """Decoder layers first..last of a Llama-like model: hidden states (rows, tokens, width) -> the same shape.

    positions: (rows or 1, tokens), each token's position for the rotary embedding. mask: None is causal attention;
    else bool (1, 1, tokens, keys), True where a token may look. cache: takes each layer's keys and values.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("grouped_query", _grouped_query_attention)
    positions = positions.to(hidden.device)
    rotary = model.model.rotary_emb(hidden, positions)
    own_attention = model.config._attn_implementation
    model.config._attn_implementation = "grouped_query"
    try:
        for layer in model.model.layers[first:last]:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, past_key_values=cache
            )
    finally:
        model.config._attn_implementation = own_attention
    return hidden


def _grouped_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling q k') v as plain products, without a copy of the keys for every query head.

    query (rows, heads, tokens, width), key and value (rows, key heads, keys, width), possibly of a wider type ->
    (rows, tokens, heads, width). On a CPU several times faster than torch's fused kernel: at one query a row, and
    in the backward pass.
    """
    rows, heads, tokens, width = query.shape
    key_heads, keys = key.shape[1:3]
    grouped = (query * scaling).to(key.dtype).reshape(rows, key_heads, heads // key_heads * tokens, width)
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, tokens, keys)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).view(rows, key_heads, -1, keys)
    return (shares @ value).view(rows, heads, tokens, width).transpose(1, 2).to(query.dtype), None


def load_base_model(
    name: str = DEFAULT_BASE_MODEL, device: str = "auto", dtype: torch.dtype | None = None, prompt: str = PROMPT
) -> BaseModel:
    """Loads a base model by name: "smollm2-135m", a folder with safetensors weights, or a hub id.

    dtype: of weights and activations; by default bfloat16 where the device multiplies it natively, else float32.
    Raises InputError for an unknown name, missing, truncated or mismatched weights, or a device that is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    target = pick_device(device)
    folder = smollm2_folder() if name == DEFAULT_BASE_MODEL else model_folder(name)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any
        report: dict[str, Any]
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or native_dtype(target),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # type: ignore[misc]
    except Exception as error:  # transformers and safetensors raise many types for a damaged or foreign folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the base model {name} from {folder}: {reason}") from error
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
    model.requires_grad_(False).eval().to(target)
    return BaseModel(name, weights_hash(folder), folder, model, tokenizer, prompt)


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
        torch.empty(1, device=target)
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
