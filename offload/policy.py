"""Policy: what the YAML says, validated once and frozen. Limits are in bytes, modes are words.

A policy holds no runtime state and takes no decision: "auto" and None are resolved by the planner.
Values that the design names but that do nothing yet are refused, never accepted silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from offload.config import load_config
from offload.sizes import NBYTES_MAX as NBYTES_MAX
from offload.sizes import TORCH_NAMES, TORCH_REFUSED, FrozenOptions
from offload.sizes import format_nbytes as format_nbytes
from offload.sizes import parse_nbytes as parse_nbytes
from offload.sizes import short_nbytes as short_nbytes
from offload.sizes import show as _show

TILE_ALIGN_NUMEL = 4096  # every tile of every plane then starts at a multiple of 4 KiB
TILE_NUMEL_MAX = 2**24  # 320 MiB of worker buffer per tile at 20 bytes per element
NUM_PATHS_MAX = 64

_EVERY = re.compile(r"every\s+([1-9][0-9]{0,8})\s+steps?")


def _not_yet(*values: str | bool) -> BeforeValidator:
    """Refuse values whose behaviour does not exist yet, and say so."""

    def refuse(value: object) -> object:
        if any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"{_show(value)} is not available yet")
        return value

    return BeforeValidator(refuse)


def _durability(value: object) -> str:
    """Return off, step, or every N steps."""
    if value is False:
        return "off"  # YAML 1.1 reads a bare off as false
    if value in ("off", "step"):
        return str(value)
    match = _EVERY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{_show(value)} is not off, step, or every N steps")
    return f"every {int(match[1])} steps"


def _absolute_paths(value: object) -> tuple[Path, ...]:
    """Return folders with ~ expanded, relative to the working directory; refuse one named twice."""
    if not isinstance(value, list | tuple) or not all(
        path and isinstance(path, str | Path) for path in value
    ):
        raise ValueError(f"{_show(value)} is not a list of folders, such as [/mnt/a/swap]")
    try:
        paths = tuple(Path(path).expanduser().absolute() for path in value)
    except RuntimeError as error:  # ~name where no such user exists
        raise ValueError(f"{_show(value)}: {error}") from error
    if not 1 <= len(paths) <= NUM_PATHS_MAX:
        raise ValueError(f"{_show(value)} names {len(paths)} folders")
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise ValueError(f"{_show(value)} names one folder twice")
    return paths


def _endurance(value: object) -> tuple[int, ...]:
    """Return the bytes that each drive is rated for, or one number for every drive."""
    rated = tuple(map(parse_nbytes, value if isinstance(value, list | tuple) else [value]))
    if not rated or 0 in rated:
        raise ValueError(f"{_show(value)} is not a size above 0, or a list of sizes")
    return rated


_SIZE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]
}
Nbytes = Annotated[
    int,
    BeforeValidator(parse_nbytes),
    Field(gt=0),
    WithJsonSchema(_SIZE_SCHEMA),
]
Endurance = Annotated[
    tuple[int, ...],
    BeforeValidator(_endurance),
    WithJsonSchema({"anyOf": [*_SIZE_SCHEMA["anyOf"], {"type": "array", "items": _SIZE_SCHEMA}]}),
]


class Section(BaseModel):
    """A frozen mapping of the YAML: unknown keys are errors, types are taken at their word."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GpuPolicy(Section):
    """The compute device and what it may hold."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?|standin)$",
        description="auto (CUDA if present, else the CPU), cpu, cuda, cuda:N, "
        "or standin (a GPU imitated on the CPU)",
    )
    budget: Nbytes | None = Field(
        default=None,
        description="a size above 0: the most that weight slots there may take; null: 3 per size",
    )


class CpuPolicy(Section):
    """Host memory."""

    budget: Nbytes = Field(
        description="a size above 0: the most host memory that the tiers may use"
    )
    pin: Literal["auto"] | bool = Field(
        default="auto",
        description="auto or true: planes rest in RAM as far as the budget goes; false: on NVMe",
    )
    weight_slots: int | None = Field(
        default=None,
        ge=1,
        description="an integer from 1: chunks of weights in host memory at once; null: planned",
    )
    grad_slots: int | None = Field(
        default=None,
        ge=1,
        description="an integer from 1: chunks of gradients in host memory at once; null: planned",
    )


class NvmePolicy(Section):
    """Swap files, striped over one folder per drive."""

    paths: Annotated[tuple[Path, ...], BeforeValidator(_absolute_paths)] = Field(
        min_length=1,
        max_length=NUM_PATHS_MAX,
        description=f"a list of 1 to {NUM_PATHS_MAX} different folders, one per drive",
    )
    budget: Nbytes | None = Field(
        default=None,
        description="a size above 0 that the swap files may take in all, or null for what is free",
    )
    io: Literal["auto", "uring", "threads"] = Field(
        default="auto",
        description="auto (io_uring where the kernel allows it, else threads), uring or threads",
    )
    checksum: bool = Field(
        default=True, description="true (every block read is verified by its CRC32C) or false"
    )
    pack: bool | None = Field(
        default=None,
        description="true (weights and moments take fewer bytes to the drive and back, without "
        "loss; the files are as large) or false; null: true where there are checksums, unless the "
        "drives are known to be faster than packing",
    )
    endurance: Endurance | None = Field(
        default=None,
        description="a size above 0, such as 600TB: what a drive is rated to write (its TBW); or a "
        "list of one per path; null: not known",
    )
    max_writes_per_day: Nbytes | None = Field(
        default=None,
        description="a size above 0: the most that a drive gets written within any 24 hours, kept "
        "by waiting between steps; null: no limit",
    )

    @field_validator("endurance", mode="after")
    @classmethod
    def _endurance_of_each_path(
        cls, value: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        paths = info.data.get("paths", ())
        if value is not None and len(value) not in (1, len(paths)):
            sizes = _show([format_nbytes(nbytes) for nbytes in value])
            raise ValueError(f"{sizes}: {len(value)} sizes for {len(paths)} paths")
        return value

    @model_validator(mode="after")
    def _packed_lengths_lie_beside_checksums(self) -> NvmePolicy:
        if self.pack and not self.checksum:
            raise ValueError("pack: true needs checksum: true")
        return self

    @property
    def packs(self) -> bool:
        """Whether planes are packed."""
        return self.checksum if self.pack is None else self.pack

    @property
    def rated_nbytes(self) -> tuple[int, ...]:
        """The endurance of every path's drive; empty where it is not known."""
        rated = self.endurance or ()
        return rated * len(self.paths) if len(rated) == 1 else rated


class TiersPolicy(Section):
    """The three tiers."""

    gpu: GpuPolicy = Field(default=GpuPolicy(), description="a mapping: the compute device")
    cpu: CpuPolicy = Field(description="a mapping with budget: host memory")
    nvme: NvmePolicy | None = Field(
        default=None, description="a mapping with paths: the drives, or null for none"
    )


class StatePolicy(Section):
    """Which planes a parameter has, and their dtypes."""

    format: Literal["exact", "fp32", "bf16", "int8"] = Field(
        default="exact",
        description="exact (bf16 weights with the low bits beside them), fp32, bf16 (as exact, "
        "with bf16 moments; not with kind torch or scale) or int8 (24-bit weights, 8-bit moments; "
        "with kind torch or scale fp32 state)",
    )


class OptimizerPolicy(Section):
    """Which optimizer the state is laid out for, and when and in what portions its steps run."""

    kind: Literal["adamw", "sgd", "lion", "adafactor", "scale", "torch"] = Field(
        default="adamw",
        description="adamw, sgd, lion, adafactor or scale: the optimizer that the loop will create;"
        " sgd and lion keep no second moment, adafactor its row and column means, scale a momentum "
        "of the last layer only; torch: the one that name says, slower",
    )
    name: str | None = Field(
        default=None,
        validate_default=True,
        description=f"with kind torch, and only there: one of {', '.join(TORCH_NAMES)}",
    )
    options: dict[str, Any] = Field(
        default={},
        validate_default=True,
        description="with kind torch or scale: a mapping of the arguments that decide which "
        "state it keeps, such as {momentum: 0.9, centered: true}, or {last: lm_head.weight}; of "
        "scale also rms and embedding, as offload.SCALE is given them",
    )
    update: Literal["auto", "eager", "deferred"] = Field(
        default="auto",
        description="auto, eager (overlaps backward, no clipping) "
        "or deferred (overlaps the next forward)",
    )
    nonfinite: Literal["raise", "skip"] = Field(
        default="raise",
        description="raise (NumericsError) or skip (the step, as if it had not been): what step() "
        "does with a gradient that is NaN or Inf; skip keeps auto deferred",
    )
    tile_numel: int = Field(
        default=262144,
        ge=TILE_ALIGN_NUMEL,
        le=TILE_NUMEL_MAX,
        multiple_of=TILE_ALIGN_NUMEL,
        description=f"a multiple of {TILE_ALIGN_NUMEL} up to {TILE_NUMEL_MAX}: "
        "elements that the worker updates at once; int8 rounds it up to 65536",
    )

    @field_validator("nonfinite", mode="after")
    @classmethod
    def _skip_needs_all_gradients(cls, value: str, info: ValidationInfo) -> str:
        if value == "skip" and info.data.get("update") == "eager":
            raise ValueError("'skip' is too late for eager updates: set optimizer.update: deferred")
        return value

    @field_validator("name", mode="after")
    @classmethod
    def _name_is_one_that_runs_here(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("kind") != "torch" and value is not None:
            raise ValueError(f"{_show(value)} needs optimizer.kind: torch")
        if value in TORCH_REFUSED:
            raise ValueError(f"{value} cannot run here: {TORCH_REFUSED[value]}")
        if info.data.get("kind") == "torch" and value not in TORCH_NAMES:
            raise ValueError(f"{_show(value)} is no optimizer that runs here")
        return value

    @field_validator("options", mode="after")
    @classmethod
    def _options_need_a_name(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("kind") not in ("torch", "scale"):
            raise ValueError(f"{_show(value)} needs optimizer.kind: torch or scale")
        return FrozenOptions(value)


class ActivationsPolicy(Section):
    """What a block keeps between forward and backward."""

    policy: Annotated[Literal["auto", "recompute", "keep"], _not_yet("offload")] = Field(
        default="auto", description="auto (recompute where a block allows it), recompute or keep"
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="auto, or an integer from 1: samples that a block computes at once",
    )


class OffloadPolicy(Section):
    """Everything that the YAML says. Prefer load_policy: it reads files, and raises PolicyError."""

    tiers: TiersPolicy = Field(description="a mapping with cpu, and gpu and nvme as needed")
    state: StatePolicy = Field(default=StatePolicy(), description="a mapping with format")
    optimizer: OptimizerPolicy = Field(
        default=OptimizerPolicy(),
        description="a mapping with kind, name, options, update, nonfinite, tile_numel",
    )
    activations: ActivationsPolicy = Field(
        default=ActivationsPolicy(), description="a mapping with policy, micro_batch"
    )
    durability: Annotated[str, BeforeValidator(_durability)] = Field(
        default="off",
        description="off (a crash loses the run), step, or every N steps: what a crash can cost",
    )

    @field_validator("optimizer", mode="after")
    @classmethod
    def _torch_keeps_fp32(cls, value: OptimizerPolicy, info: ValidationInfo) -> OptimizerPolicy:
        state = info.data.get("state")
        no_moments = value.kind in ("torch", "scale")
        if no_moments and state is not None and state.format == "bf16":
            raise ValueError(
                f"kind {value.kind} keeps what it keeps in fp32, so state.format bf16 would be "
                "exact under another name: set it to exact"
            )
        return value

    @field_validator("durability", mode="after")
    @classmethod
    def _durability_needs_files(cls, value: str, info: ValidationInfo) -> str:
        tiers = info.data.get("tiers")
        if value != "off" and tiers is not None and tiers.nvme is None:
            raise ValueError(f"{value!r} needs a drive: set tiers.nvme.paths")
        return value

    @property
    def commit_every(self) -> int:
        """Optimizer steps from one commit to the next; 0: none."""
        if self.durability == "off":
            return 0
        return int(self.durability.split()[1]) if self.durability.startswith("every") else 1


def load_policy(
    source: str | Path | Mapping[str, object] | OffloadPolicy, overrides: Sequence[str] = ()
) -> OffloadPolicy:
    """Return the policy of a YAML file, a mapping or a policy, with overrides applied.

    An override is "key.path=YAML value", such as "tiers.cpu.budget=24GiB". Raises PolicyError with
    a line per bad key: its path, value, what is accepted, and for an unknown key the nearest one.
    """
    return load_config(OffloadPolicy, source, overrides)


def policy_schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML, for editors and documentation."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **OffloadPolicy.model_json_schema()}
