"""Finds the engine of a parameter, and routes torch.nn.utils' gradient clipping to it.

[Note: routing] Gradients leave Parameter.grad as they land, so clip_grad_norm_ would see none and
clip nothing, without a word. While a model is offloaded its two helpers are replaced: they are
looked up at call time, so it works too where user code imported clip_grad_norm_ before.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from offload.errors import StateError
from offload.policy import OffloadPolicy
from offload.spec import ParamSpec
from offload.stats import StepResult

_clip_grad: types.ModuleType = importlib.import_module("torch.nn.utils.clip_grad")
_utils: types.ModuleType = importlib.import_module("torch.nn.utils")


class Owner(Protocol):
    """What an optimizer and the clipping functions need of an offloaded model."""

    policy: OffloadPolicy

    def owns(self, param: torch.Tensor) -> bool: ...

    def spec_of(self, param: torch.Tensor) -> ParamSpec: ...

    def has_gradients(self) -> bool: ...

    def total_norm(
        self, norm_type: float, params: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor: ...

    def scale_gradients(
        self, params: Sequence[torch.Tensor], max_norm: float, total: torch.Tensor
    ) -> None: ...

    def note_loss(self, *, finite: bool) -> None: ...

    def attach(self, optimizer: Any) -> None: ...

    def optimizer_step(self, optimizer: Any) -> StepResult: ...

    def unscale_gradients(self, params: Sequence[torch.Tensor], factor: float) -> bool | None: ...

    def expect_scaled_loss(self) -> None: ...

    def zero_grad(self) -> None: ...

    def step_counts(self, params: list[torch.Tensor]) -> list[int]: ...

    def torch_state(self, params: list[torch.Tensor], moments: Mapping[str, Any]) -> Any: ...

    def changing_state(self, who: str) -> AbstractContextManager[None]: ...


_owners: list[Owner] = []  # open engines: the one registry of the package
_originals: dict[tuple[object, str], Any] = {}
_hooks: list[RemovableHandle] = []
_lock = threading.Lock()


def owner_of(param: torch.Tensor) -> Owner | None:
    """The open engine that holds this parameter."""
    return next((owner for owner in _owners if owner.owns(param)), None)


def refuse_twice(params: Iterable[torch.Tensor]) -> None:
    """Raise StateError where an engine holds a parameter already."""
    if any(owner_of(param) is not None for param in params):
        raise StateError(
            "this model is offloaded already; close the first engine before the second."
        )


def register(owner: Owner) -> None:
    """Make an engine findable; the first one also installs the routing."""
    with _lock:
        _owners.append(owner)
        if len(_owners) == 1:
            _install()


def unregister(owner: Owner) -> None:
    """Forget an engine; with the last one torch gets its own functions back. Idempotent."""
    with _lock:
        if owner in _owners:
            _owners.remove(owner)
        if not _owners:
            for (module, name), function in _originals.items():
                setattr(module, name, function)
            _originals.clear()
            while _hooks:
                _hooks.pop().remove()


def _install() -> None:
    _replace(_clip_grad, "_get_total_norm", _route_norm)
    _replace(_clip_grad, "_clip_grads_with_norm_", _route_scaling)
    _replace(_utils, "get_total_norm", _route_norm)
    _replace(_utils, "clip_grads_with_norm_", _route_scaling)
    _replace(_clip_grad, "_group_tensors_by_device_and_dtype", _refuse_values)
    _replace(torch.autograd, "backward", _watch_loss)
    _replace(GradScaler, "scale", _note_scaling)
    _replace(GradScaler, "_unscale_grads_", _route_unscaling)
    _hooks.append(register_optimizer_step_pre_hook(_refuse_foreign_step))


def _watch_loss(original: Any) -> Any:
    """A NaN loss can have finite gradients (an L1 penalty on absent weights): look at it too."""

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        bad = any(_is_bad_loss(root) for root in roots if isinstance(root, torch.Tensor))
        for owner in _owners if bad else ():
            owner.note_loss(finite=False)
        try:
            original(roots, *args, **kwargs)
        finally:
            for owner in _owners if bad else ():
                owner.note_loss(finite=True)

    return backward


def _is_bad_loss(root: torch.Tensor) -> bool:
    """Only where asking costs nothing: on a GPU the answer would stall the stream."""
    cheap = root.numel() == 1 and root.device.type == "cpu" and root.is_floating_point()
    return cheap and not bool(root.isfinite())


def _refuse_foreign_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Another optimizer would see no gradients and change nothing, without a word."""
    if hasattr(optimizer, "ops_for"):
        return
    for group in optimizer.param_groups:
        if any(owner_of(param) is not None for param in group["params"]):
            raise StateError(
                f"{type(optimizer).__name__}.step() on offloaded parameters would train nothing, "
                "because their gradients and state are in the tiers. Use "
                "offload.AdamW(model.parameters(), ...), or offload.Torch for this class."
            )


def _replace(module: object, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(module, name)
    _originals[(module, name)] = original
    setattr(module, name, make(original))


def _route_norm(original: Any) -> Any:
    def total_norm(
        tensors: Any,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        params = _clipped_parameters(sys._getframe(1))
        parts = [owner.total_norm(norm_type, mine) for owner, mine in _by_owner(params)]
        if not parts:
            plain: torch.Tensor = original(tensors, norm_type, error_if_nonfinite, foreach)
            return plain
        if tensors:
            parts.append(original(tensors, norm_type, False, foreach).cpu().float())
        norm = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"The total norm of order {norm_type} for gradients is non-finite.")
        return norm

    return total_norm


def _clipped_parameters(caller: types.FrameType) -> list[torch.Tensor]:
    """The parameters that clip_grad_norm_ was called with; it hands on their gradients only."""
    found = (
        caller.f_locals.get("parameters") if caller.f_code.co_name == "clip_grad_norm_" else None
    )
    return [p for p in found if isinstance(p, torch.Tensor)] if isinstance(found, list) else []


def _by_owner(params: Iterable[torch.Tensor]) -> list[tuple[Owner, list[torch.Tensor]]]:
    groups: dict[int, tuple[Owner, list[torch.Tensor]]] = {}
    for param in params:
        owner = owner_of(param)
        if owner is not None:
            groups.setdefault(id(owner), (owner, []))[1].append(param)
    return list(groups.values())


def _route_scaling(original: Any) -> Any:
    def scale(
        parameters: Any, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None
    ) -> None:
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for owner, mine in _by_owner(params):
            owner.scale_gradients(mine, max_norm, total_norm)
        original([p for p in params if owner_of(p) is None], max_norm, total_norm, foreach)

    return scale


def _note_scaling(original: Any) -> Any:
    """Which model the loss is of cannot be known here, so every open engine hears of it."""

    def scale(scaler: Any, outputs: Any) -> Any:
        for owner in _owners if scaler.is_enabled() else ():
            owner.expect_scaled_loss()
        return original(scaler, outputs)

    return scale


def _route_unscaling(original: Any) -> Any:
    """GradScaler divides Parameter.grad, where it would find nothing. See [Note: routing]."""

    def unscale(scaler: Any, optimizer: Any, inv_scale: Any, found_inf: Any, fp16: Any) -> Any:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        pairs = _by_owner(params)
        if not pairs:
            return original(scaler, optimizer, inv_scale, found_inf, fp16)
        _refuse_foreign_step(optimizer, (), {})
        finite = [owner.unscale_gradients(mine, float(inv_scale)) for owner, mine in pairs]
        bad = [not each for each in finite if each is not None]
        return {found_inf.device: torch.full_like(found_inf, float(any(bad)))} if bad else {}

    return unscale


def _refuse_values(original: Any) -> Any:
    def group(tensors: Iterable[list[torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        rows = list(tensors)
        if not any(rows) and any(owner.has_gradients() for owner in _owners):
            raise StateError(
                "clip_grad_value_ does not work on offloaded gradients, which are in the tiers; "
                "use torch.nn.utils.clip_grad_norm_ or engine.clip_grad_norm_."
            )
        return original(rows, *args, **kwargs)

    return group
