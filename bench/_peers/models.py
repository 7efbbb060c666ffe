"""The Llama shapes that every engine trains, with random weights; knows nothing of any engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB = 32000


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of one Llama; `hidden` and `intermediate` count features."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate: int

    def num_params(self) -> int:
        """Count the parameters: embedding, head, blocks and norms."""
        kv_features = self.hidden // self.num_heads * self.num_kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv_features
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * VOCAB * self.hidden + self.num_layers * block + self.hidden

    def config(self) -> Any:
        """Return the transformers LlamaConfig; SDPA attention, nothing tied."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=VOCAB,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )


MODELS = {
    "tiny": LlamaShape(hidden=256, num_layers=4, num_heads=4, num_kv_heads=4, intermediate=704),
    "350m": LlamaShape(
        hidden=1024, num_layers=24, num_heads=16, num_kv_heads=16, intermediate=2816
    ),
    "1b": LlamaShape(hidden=2048, num_layers=22, num_heads=32, num_kv_heads=4, intermediate=5632),
}


def build_model(name: str) -> Any:
    """Build the bf16 model on torch's current default device, in training mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(MODELS[name].config(), dtype=torch.bfloat16)
    model.train()
    return model
