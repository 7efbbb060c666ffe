"""The configuration of a fine-tuning job: a policy, and what to train, on what, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from offload.config import load_config
from offload.data import DataSection
from offload.errors import PolicyError
from offload.policy import OffloadPolicy, Section
from offload.sources import ModelSection


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-4 as a string; take it for the number that was meant."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]


class TrainSection(Section):
    """How to train. One optimizer step takes batch_size * accumulation sequences."""

    steps: Count = Field(description="an integer from 1: optimizer steps")
    batch_size: Count = Field(default=2, description="an integer from 1: sequences per backward")
    accumulation: Count = Field(default=1, description="an integer from 1: backwards per step")
    lr: Number = Field(default=1e-4, gt=0.0, description="a number above 0: the highest rate")
    weight_decay: Number = Field(
        default=0.0,
        ge=0.0,
        description="a number from 0; acts on matrices, not on norms and biases",
    )
    betas: tuple[Number, Number] = Field(
        default=(0.9, 0.999), strict=False, description="two numbers from 0 to below 1"
    )
    warmup: int = Field(
        default=0, ge=0, description="an integer from 0: steps in which the rate rises from 0"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="linear, cosine (both fall to 0) or constant"
    )
    clip: Number | None = Field(
        default=None, gt=0.0, description="a number above 0: the largest gradient norm; null: none"
    )
    seed: int = Field(default=0, ge=0, description="an integer from 0: order of the text, dropout")
    eval_batches: Count = Field(
        default=16, description="an integer from 1: batches of held-out text per validation"
    )


class OutputSection(Section):
    """What to leave behind."""

    folder: Annotated[Path, BeforeValidator(lambda value: Path(str(value)).expanduser())] = Field(
        description="a folder for the trained model, its tokenizer and log.jsonl"
    )
    overwrite: bool = Field(default=False, description="true or false: replace an earlier result")
    prompt: str = Field(default="The ", min_length=1, description="a text that samples continue")
    sample_tokens: int = Field(
        default=32, ge=0, description="an integer from 0: length of a sample; 0: no samples"
    )


class FinetuneConfig(OffloadPolicy):
    """A fine-tuning job: the keys of OffloadPolicy, and model, data, train and output."""

    model: ModelSection = Field(description="a mapping with one of path, package and random")
    data: DataSection = Field(description="a mapping with one of paths, package and builtin")
    train: TrainSection = Field(description="a mapping with steps, batch_size, lr and more")
    output: OutputSection = Field(description="a mapping with folder, and prompt and more")

    def policy(self) -> OffloadPolicy:
        """The policy of the run; `auto` updates are eager where no step needs all gradients."""
        kept = {name: getattr(self, name) for name in OffloadPolicy.model_fields}
        if self.optimizer.update == "auto" and self.steps_alone:
            kept["optimizer"] = self.optimizer.model_copy(update={"update": "eager"})
        return OffloadPolicy(**kept)

    @property
    def steps_alone(self) -> bool:
        """Whether a gradient is final as soon as it lands: no clipping, no accumulation."""
        return self.train.clip is None and self.train.accumulation == 1


def load_finetune(
    source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()
) -> FinetuneConfig:
    """Return the job of a YAML file or mapping. Raises PolicyError with a line per bad key."""
    config = load_config(FinetuneConfig, source, overrides)
    if config.optimizer.update == "eager" and not config.steps_alone:
        raise PolicyError(
            "optimizer.update: eager updates a weight as soon as its gradient lands, which rules "
            "out train.clip and train.accumulation above 1. Set it to auto or deferred."
        )
    return config


def numbers_of(config: FinetuneConfig) -> dict[str, Any]:
    """What decides the numbers of a job, by key path: a run goes on only where all of it is as it
    was. Where bytes lie, and when updates run, is not part of it.
    """
    tree = config.model_dump(mode="json")
    facts = {
        f"{section}.{key}": value
        for section in ("model", "data", "train", "state", "activations")
        for key, value in tree[section].items()
    }
    facts.pop("train.eval_batches")
    optimizer = tree["optimizer"]
    facts |= {f"optimizer.{key}": optimizer[key] for key in ("kind", "name", "options")}
    return facts


def changed_numbers(before: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """One line per key that is not as it was."""
    now = numbers_of(config)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key)
    ]
