"""SCALE on state in the tiers: matrices in tiles, the last layer in torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from offload.chunk import Chunk, Ops
from offload.errors import StateError
from offload.factored import FactoredStep, ScaleParam
from offload.factors import flat_matrix
from offload.formats import Plane
from offload.optim import TierOptimizer
from offload.routing import Owner
from offload.scale import LAST, NORM_MIN, PlainScale, check_scale, is_input_first
from offload.torchstep import ParamStep, TorchStep
from offload.update import FactoredOp

_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class SCALE(TierOptimizer):
    """SCALE (arXiv 2506.16659): SGD on normalised columns, momentum in the layer `last` alone, Adam
    on vectors; needs `optimizer.kind: scale`, and where `last` is another name, `options: {last:}`.

    Parameters with `embedding` in their name are kept input first. The chunk of `last` is updated
    on whole planes ([Note: torch step]), because a momentum has no norm before all of it is there;
    all others in tiles. See [Note: SCALE].
    """

    kind = "scale"

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        last: str | None = LAST,
        embedding: str = "embed",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        rms: bool = False,
        maximize: bool = False,
    ) -> None:
        check_scale(lr=lr, weight_decay=weight_decay, eps=eps, momentum=momentum, betas=betas)
        self._last, self._momentum = last, momentum
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "last": last,
            "embedding": embedding, "betas": betas, "eps": eps, "rms": rms, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _find_owner(self) -> Owner:
        owner = super()._find_owner()
        specs = [owner.spec_of(param) for param in self._all_params()]
        with_momentum = [s.name for s in specs if any(e.name == "momentum_buffer" for e in s.state)]
        wanted = [self._last] if self._last is not None and self._momentum else []
        if any(name not in wanted for name in with_momentum):
            raise StateError(
                f"offload.SCALE(last={self._last!r}, momentum={self._momentum}), and the plan has "
                f"a momentum for {with_momentum[0]}. Set optimizer.options: {{last: null}} in the "
                f"policy, or give SCALE this name and a momentum above 0."
            )
        names = [spec.name for spec in specs]
        if any(name in names and name not in with_momentum for name in wanted):
            raise StateError(
                f"the plan has no momentum for {self._last}. Set optimizer.options: "
                f"{{last: {self._last}}} in the policy, or give SCALE last=None."
            )
        return owner

    def update_of(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Ops | None:
        captured = list(self._capture(chunk, positions, scales))
        if not captured:
            return None
        if chunk.spec.state_plane is Plane.TORCH_STATE:
            steps = [_in_torch(*row) for row in captured]
            return TorchStep(cls=PlainScale, spec=chunk.spec, steps=steps)
        return FactoredStep(tuple(_in_tiles(chunk, *row) for row in captured))


def _in_torch(position: int, group: dict[str, Any], common: dict[str, Any]) -> ParamStep:
    sign = -1.0 if common["maximize"] else 1.0
    options = {key: value for key, value in group.items() if key not in ("params", "maximize")}
    return ParamStep(
        position=position,
        options=options | {"lr": common["lr"], "weight_decay": common["weight_decay"]},
        is_first=common["step"] == 1,
        grad_scale=sign * common["grad_scale"],
    )


def _in_tiles(
    chunk: Chunk, position: int, group: dict[str, Any], common: dict[str, Any]
) -> ScaleParam:
    spec = chunk.spec.params[position]
    num_rows, num_cols = spec.matrix or flat_matrix(spec.shape)
    op = FactoredOp(beta1=None, eps=NORM_MIN, num_rows=num_rows, num_cols=num_cols, **common)
    beta1, beta2 = map(float, group["betas"])
    return ScaleParam(
        position=position, op=op, state=spec.state, rms=bool(group["rms"]), betas=(beta1, beta2),
        vector_eps=float(group["eps"]),
        by_cols=is_input_first(
            spec.name, len(spec.shape), embedding=group["embedding"], last=group["last"]
        ),
    )  # fmt: skip
