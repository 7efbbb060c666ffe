"""Building a Hugging Face model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.errors import StateError


def meta_model(folder: Path) -> nn.Module:
    """The model that `folder`'s config.json describes, all parameters on meta, in training mode.

    Raises StateError where transformers is missing or the folder has no config.
    """
    try:
        import transformers
    except ImportError as error:
        raise StateError(
            "load_pretrained needs transformers: pip install 'offload[hf]'."
        ) from error
    if not (folder / "config.json").exists():
        raise StateError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    config = transformers.AutoConfig.from_pretrained(folder)
    build: Any = transformers.AutoModelForCausalLM.from_config
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        model: Any = build(config) if not named or named[0] is None else named[0](config)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.train()
    return model  # type: ignore[no-any-return]
