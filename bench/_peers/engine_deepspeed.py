"""DeepSpeed ZeRO-3 with parameters and optimizer state on NVMe, on its CPU accelerator.

The configuration is the leanest one found that works. With DeepSpeed's own defaults this test holds
nearly everything in memory (`max_in_cpu` 1e9, one sub-group); with `max_in_cpu` 0 and the default
number of buffers it stops at an assertion; one parameter buffer, as large as the largest
parameter, is held for every live parameter, so buffers and live parameters are limited together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imports fail inside zero.Init
from models import MODELS, VOCAB, build_model


@dataclass(frozen=True, kw_only=True)
class Limits:
    """DeepSpeed's limits, counted in parameters; `num_buffers` in buffers."""

    sub_group: int
    prefetch: int
    max_live: int
    num_buffers: int


LIMITS = {
    # prefetch 0: the prefetcher asks for the same parameter twice in models this small
    "tiny": Limits(sub_group=10**7, prefetch=0, max_live=10**7, num_buffers=24),
    "350m": Limits(sub_group=4 * 10**7, prefetch=10**7, max_live=3 * 10**7, num_buffers=16),
    "1b": Limits(sub_group=7 * 10**7, prefetch=2 * 10**7, max_live=5 * 10**7, num_buffers=12),
}


class DeepSpeedTrainer:
    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        params = list(model.parameters())
        self.num_params = sum(param.ds_numel for param in params)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, config=config, model_parameters=params
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._engine(input_ids=tokens, labels=tokens).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def update(self) -> None:
        self._engine.step()

    def finish(self) -> None:
        """DeepSpeed's step returns when its writes are done."""

    def close(self) -> dict[str, str]:
        return {"deepspeed": deepspeed.__version__}


def start(job: dict[str, Any]) -> DeepSpeedTrainer:
    config = deepspeed_config(job["model"], job["batch"], job["dir"])
    deepspeed.init_distributed(dist_backend="gloo")
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = build_model(job["model"])
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return DeepSpeedTrainer(model, config)


def deepspeed_config(model: str, batch: int, nvme_path: str) -> dict[str, Any]:
    """Return the whole configuration: stage 3, everything on NVMe, bf16 with fp32 master."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": zero_config(model, nvme_path),
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "single_submit": False,
            "overlap_events": True,
            "intra_op_parallelism": 1,
        },
    }


def zero_config(model: str, nvme_path: str) -> dict[str, Any]:
    """Return the stage 3 part, with the limits of `model`."""
    limits = LIMITS[model]
    largest_param = VOCAB * MODELS[model].hidden
    return {
        "stage": 3,
        "sub_group_size": limits.sub_group,
        "reduce_bucket_size": largest_param * 103 // 100,
        "stage3_prefetch_bucket_size": limits.prefetch,
        "stage3_max_live_parameters": limits.max_live,
        "stage3_max_reuse_distance": limits.max_live,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": nvme_path,
            "pin_memory": False,
            "buffer_count": 4,
            "pipeline_read": False,  # pipelines need more buffers, and then much more memory
            "pipeline_write": False,
            "fast_init": False,
        },
        "offload_param": {
            "device": "nvme",
            "nvme_path": nvme_path,
            "pin_memory": False,
            "buffer_count": limits.num_buffers,
            "buffer_size": largest_param + 1024,
            "max_in_cpu": 0,
        },
    }
