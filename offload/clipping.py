"""What gradients are multiplied by between backward() and the update: clipping, and unscaling."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence

import torch

from offload.errors import StateError
from offload.landing import Gradients

Place = tuple[int, int]  # (chunk index, position)


class Clipping:
    """The factor of every gradient of this step. Nothing is read or scaled before its update."""

    def __init__(self, gradients: Gradients, places: Mapping[int, Place]) -> None:
        self._gradients = gradients
        self._places = places  # by id of the parameter
        self.scales: dict[Place, float] = {}
        self.needs_all = False  # somebody has asked for all gradients before the first update
        self._norm: float | None = None  # of all gradients, before they were clipped

    def clear(self) -> None:
        """Forget what was for this step's gradients."""
        self.scales.clear()
        self.needs_all = False
        self._norm = None

    @property
    def norm(self) -> float:
        """The norm of all gradients that have landed, before clipping."""
        return float(self.total_norm(2.0)) if self._norm is None else self._norm

    def total_norm(
        self, norm_type: float, params: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The norm of the landed gradients (fp32 scalar, CPU), of all parameters or of `params`, as
        they have been scaled so far.
        """
        if float(norm_type) != 2.0:
            raise StateError(f"norm_type {norm_type}: offloaded gradients have a 2-norm only.")
        places: Container[Place] | None = None
        if params is not None:
            places = {self._places[id(param)] for param in params}
        return torch.tensor(self._gradients.norm(places, self.scales), dtype=torch.float32)

    def clip(self, params: Iterable[torch.Tensor], max_norm: float, total: torch.Tensor) -> None:
        """Scale so that `total` becomes at most max_norm."""
        self.needs_all = True
        self._norm = self.norm
        coefficient = float(torch.clamp(max_norm / (total.cpu() + 1e-6), max=1.0))
        if coefficient == 1.0:
            return
        if self._gradients.anything_updated:
            raise StateError(
                f"clip_grad_norm_: the norm {float(total):.6g} is above {max_norm}, but "
                "optimizer.update eager has "
                "applied gradients already. Set optimizer.update: deferred to clip."
            )
        self.scale(params, coefficient)

    def unscale(self, params: Sequence[torch.Tensor], factor: float) -> bool | None:
        """Undo a loss scale; whether all gradients of `params` are finite, None where there are
        none.
        """
        self.needs_all = True
        self.refuse_eager()
        places = {self._places[id(param)] for param in params}
        if not places & self._gradients.contributors():
            return None
        self.scale(params, factor)
        return math.isfinite(self._gradients.norm(places))

    def expect_scaled_loss(self, *, may_wait: bool) -> None:
        """A loss is about to be scaled: no update may begin before its gradients are unscaled."""
        if may_wait:
            self._gradients.eager = self._gradients.eager and self._gradients.anything_updated
        if self._gradients.eager:
            self.refuse_eager(always=True)

    def refuse_eager(self, *, always: bool = False) -> None:
        """Raise StateError where gradients are updates already."""
        if always or self._gradients.anything_updated:
            raise StateError(
                "GradScaler: optimizer.update eager applies gradients in backward(), before they "
                "are unscaled. Set optimizer.update: deferred; or train without GradScaler, which "
                "bf16 does not need."
            )

    def why_wait(self, *, resident: bool, skips: bool) -> str:
        """Why updates wait for all gradients of a step like this one; empty where they need not."""
        if resident:
            return "all gradients fit in RAM, so waiting for them costs nothing"
        if self.needs_all:
            return "clip_grad_norm_ or GradScaler needs every gradient before the first update"
        if skips:
            return "optimizer.nonfinite: skip needs every gradient before the first update"
        if self._gradients.num_backwards != 1:
            return "gradients accumulate over several backward() calls"
        return ""

    def scale(self, params: Iterable[torch.Tensor], factor: float) -> None:
        """Multiply the landed gradients of `params`."""
        for param in params:
            place = self._places[id(param)]
            self.scales[place] = self.scales.get(place, 1.0) * factor
