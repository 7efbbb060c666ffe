"""A plain PyTorch loop with the model on three tiers: a tiny random Llama, in a few seconds.

Run as: python examples/library.py

The Llama learns one batch by heart, so the loss falls. Needs transformers, and no download.
Swap files, a trace and the trained model go to ./runs/library.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import offload

POLICY = Path(__file__).with_name("tiers.yaml")
OUT = Path("runs/library/model")
NUM_STEPS = 12


def make_model() -> nn.Module:
    """A Llama of 3.7 M random parameters: 44 MB of weights and AdamW state."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    return AutoModelForCausalLM.from_config(config)


def make_batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 1024, (4, 64))
    return [{"input_ids": ids, "labels": ids}] * NUM_STEPS


def main() -> None:
    model, loader = make_model(), make_batches()
    with offload.offload(model, POLICY) as engine:
        print(engine.plan)
        device = next(model.parameters()).device
        optimizer = offload.AdamW(model.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        for batch in loader:
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            moved = engine.stats().nbytes["nvme read"] / 2**20
            print(f"loss {loss.item():.3f}  gradient norm {norm:.2f}  {moved:.0f} MiB read")
        print(engine.memory())
        engine.export(OUT)  # finishes what is pending, then streams safetensors out of the tiers
        engine.trace(OUT.parent / "step.trace.json")  # open it in https://ui.perfetto.dev
    # The model is an ordinary one again, with its trained weights in memory.
    print(f"model.lm_head.weight is {model.lm_head.weight.dtype}, {model.lm_head.weight.device}")
    reloaded = AutoModelForCausalLM.from_pretrained(OUT)
    print(f"transformers loads {OUT}: {reloaded.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
