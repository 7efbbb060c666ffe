"""Tiny random models, one per shape of network that offload has to survive.

Each entry builds in milliseconds, has three or four repeated blocks, and keeps every block above
4096 elements so that a chunk spans several tiles at the tile size that the tests use. Weights are
fp32 and depend on a fixed seed only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]

VOCAB = 160
HIDDEN = 32
SEQUENCE = 12


@dataclass(frozen=True)
class ZooModel:
    """How to build one tiny model, its batches and its loss."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.dtype], Batch]  # (seed, floating dtype of the inputs)
    loss: Callable[[nn.Module, Batch], Tensor]
    # The loss bits of a split batch equal the unsplit one only if no block mixes samples (batch
    # norm does).
    splits_exactly: bool = True

    def make_model(self) -> nn.Module:
        """Build the model in train mode with the same fp32 weights every time."""
        rng_state = torch.get_rng_state()
        torch.manual_seed(1234)
        model = self.build()
        torch.set_rng_state(rng_state)
        return model.train()

    def make_batch(self, seed: int, dtype: torch.dtype) -> Batch:
        """Return the inputs of one micro step; floating inputs in `dtype`."""
        return self.batch(seed, dtype)


# Hugging Face


def hf_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def token_batch(seed: int, dtype: torch.dtype) -> Batch:
    del dtype
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCAB, (2, SEQUENCE), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def masked_batch(seed: int, dtype: torch.dtype) -> Batch:
    """Two sequences of different lengths, so that an attention mask travels through the blocks."""
    batch = token_batch(seed, dtype)
    attention_mask = torch.ones_like(batch["input_ids"])
    attention_mask[1, SEQUENCE - 3 :] = 0
    batch["labels"][attention_mask == 0] = -100
    return {**batch, "attention_mask": attention_mask}


def causal_lm(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    return AutoModelForCausalLM.from_config(config)


def build_llama() -> nn.Module:
    from transformers import LlamaConfig

    return causal_lm(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    )


def build_qwen3() -> nn.Module:
    from transformers import Qwen3Config

    return causal_lm(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def build_gpt2() -> nn.Module:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    if not (config.resid_pdrop > 0 and config.attn_pdrop > 0 and config.embd_pdrop > 0):
        raise RuntimeError("gpt2 is the dropout model of the zoo")
    return causal_lm(config)


def build_opt() -> nn.Module:
    from transformers import OPTConfig

    return causal_lm(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
        )
    )


def build_mixtral() -> nn.Module:
    from transformers import MixtralConfig

    return causal_lm(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    )


def build_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def t5_batch(seed: int, dtype: torch.dtype) -> Batch:
    source = masked_batch(seed, dtype)
    target = token_batch(seed + 100_003, dtype)["labels"][:, : SEQUENCE - 4].contiguous()
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "labels": target,
    }


def build_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertForMaskedLM(config)


# Plain torch


class BasicBlock(nn.Module):
    """The residual block of ResNet-18: two 3x3 convolutions with batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ConvNet(nn.Module):
    """A small ResNet: stem, two stages of two blocks, pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.stage1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.stage2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


def image_batch(seed: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
    return {"x": images, "target": torch.randint(0, 10, (4,), generator=generator)}


def classify_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]).float(), batch["target"])


WIDTH = 48


class ResidualMLP(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class SharedLayerMLP(nn.Module):
    """One linear layer, outside the blocks, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(24, WIDTH)
        self.blocks = nn.ModuleList(ResidualMLP() for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.inp(x))
        x = self.blocks[1](self.mix(x))
        return self.out(self.blocks[2](torch.tanh(self.mix(x))))


class SharedBlockMLP(nn.Module):
    """The same block object appears twice in the list (as in ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(24, WIDTH)
        first, second = ResidualMLP(), ResidualMLP()
        self.blocks = nn.ModuleList([first, second, first])
        self.out = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class BranchMLP(nn.Module):
    """Skips its second block when the mean of the input is negative, so its parameters get no
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(24, WIDTH)
        self.blocks = nn.ModuleList(ResidualMLP() for _ in range(4))
        self.out = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        skip = bool(x.mean() < 0)
        x = self.inp(x)
        for index, block in enumerate(self.blocks):
            if not (skip and index == 1):
                x = block(x)
        return self.out(x)


class LinearListMLP(nn.Module):
    """The blocks are bare nn.Linear modules; the activation lives in the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(24, 80)
        self.layers = nn.ModuleList(nn.Linear(80, 80) for _ in range(4))
        self.out = nn.Linear(80, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


def regression_batch(seed: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 24, generator=generator)
    target = torch.randn(6, 24, generator=generator)
    return {"x": x.to(dtype), "target": target}


def branch_batch(seed: int, dtype: torch.dtype) -> Batch:
    """Alternate the branch by step; seeds of one step differ by less than 10 (see
    parity.batch_seed).
    """
    batch = regression_batch(seed, dtype)
    sign = -1.0 if (seed // 10) % 2 else 1.0
    return {"x": sign * batch["x"].abs(), "target": batch["target"]}


def regression_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]).float(), batch["target"])


ZOO: dict[str, ZooModel] = {
    entry.name: entry
    for entry in (
        ZooModel("llama", build_llama, token_batch, hf_loss),
        ZooModel("qwen3", build_qwen3, masked_batch, hf_loss),
        ZooModel("gpt2", build_gpt2, token_batch, hf_loss, splits_exactly=False),
        ZooModel("opt", build_opt, masked_batch, hf_loss, splits_exactly=False),
        ZooModel("mixtral", build_mixtral, token_batch, hf_loss, splits_exactly=False),
        ZooModel("t5", build_t5, t5_batch, hf_loss, splits_exactly=False),
        ZooModel("bert", build_bert, masked_batch, hf_loss, splits_exactly=False),
        ZooModel("convnet", ConvNet, image_batch, classify_loss, splits_exactly=False),
        ZooModel("shared_layer", SharedLayerMLP, regression_batch, regression_loss),
        ZooModel("shared_block", SharedBlockMLP, regression_batch, regression_loss),
        ZooModel("branch", BranchMLP, branch_batch, regression_loss),
        ZooModel("linear_list", LinearListMLP, regression_batch, regression_loss),
    )
}
