"""What gradients are multiplied by between backward() and the update: clipping, and unscaling."""

from __future__ import annotations

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
        self.norm: float | None = None  # what was computed last in this step

    def end_step(self) -> None:
        """Forget what was for this step's gradients."""
        self.scales.clear()
        self.needs_all = False
        self.norm = None

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
        self.norm = float(total)
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

    def scale(self, params: Iterable[torch.Tensor], factor: float) -> None:
        """Multiply the landed gradients of `params`."""
        for param in params:
            place = self._places[id(param)]
            self.scales[place] = self.scales.get(place, 1.0) * factor
