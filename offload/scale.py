"""SCALE: SGD on normalised columns, with momentum in the last layer only. A plain torch optimizer:
the reference, and what steps the last layer of an offloaded model.

[Note: SCALE] From Glentis, Li, Han and Hong, arXiv 2506.16659: m = beta m + (1 - beta) g in the
last layer and m = g elsewhere, and every column of m is divided by its 2-norm. The paper's matrices
are input times output, so a column has all weights of one output: a row of torch's Linear.weight,
but a column of an embedding, which torch keeps input first. The authors' program trains vectors
with AdamW, and so does this; it also divides by the root of the mean square in place of the norm,
which `rms` does here (their learning rates belong to that). A tied embedding that is the last layer
is normalised here as what it is at the output, by rows; their program goes by the name, and
normalises it by columns, as every embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch

SCALE_OPTIONS = ("last", "momentum", "embedding", "rms")  # that a policy may have
LAST = "lm_head.weight"  # what Hugging Face calls the last layer of a language model
EMBEDDING, MOMENTUM = "embed", 0.9
_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
NORM_MIN = 1e-8  # a column without a gradient stays as it is


def check_scale(hyper: Mapping[str, Any]) -> None:
    """Raise ValueError for a hyperparameter of SCALE that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        if not _is_number(hyper[name]) or not hyper[name] >= 0:
            raise ValueError(f"SCALE: {name} is {hyper[name]}; it must be 0 or more.")
    betas = hyper["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"SCALE: betas is {betas}; it must be two numbers.")
    for name, value in zip(("beta1", "beta2"), betas, strict=True):
        _check_share(name, value)
    check_options({name: hyper[name] for name in SCALE_OPTIONS})


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that SCALE cannot use; `options` has some of SCALE_OPTIONS."""
    last, embedding = options.get("last"), options.get("embedding", EMBEDDING)
    rms = options.get("rms", False)
    if last is not None and not (isinstance(last, str) and last):
        raise ValueError(f"SCALE: last is {last!r}; it must be a parameter's name, or none.")
    if not (isinstance(embedding, str) and embedding):
        raise ValueError(f"SCALE: embedding is {embedding!r}; it must be a part of a name.")
    if not isinstance(rms, bool):
        raise ValueError(f"SCALE: rms is {rms!r}; it must be true or false.")
    _check_share("momentum", options.get("momentum", MOMENTUM))


def _check_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"SCALE: {name} is {value}; it must be in [0, 1).")


def _is_number(value: object) -> TypeGuard[float]:
    is_tensor = isinstance(value, torch.Tensor) and value.numel() == 1
    return is_tensor or (isinstance(value, int | float) and not isinstance(value, bool))


def is_input_first(name: str, ndim: int, *, embedding: str, last: str | None) -> bool:
    """Whether a parameter has one input's weights in a row. See [Note: SCALE]."""
    return ndim == 2 and embedding in name and name != last


class PlainScale(torch.optim.Optimizer):
    """SCALE (arXiv 2506.16659) in memory: a moment of the parameter `last`, two of vectors.

    Give it model.named_parameters(): names say which parameter is the last layer's, and that those
    with `embedding` in their name are kept input first, but for `last`. `last=None` is no momentum
    anywhere. See [Note: SCALE].
    """

    needs_names = True  # a part of a model, too, is made from named parameters

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        momentum: float = MOMENTUM,
        weight_decay: float = 0.0,
        last: str | None = LAST,
        embedding: str = EMBEDDING,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        rms: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "last": last,
            "embedding": embedding, "betas": betas, "eps": eps, "rms": rms,
        }  # fmt: skip
        check_scale(defaults)
        given: list[Any] = list(params)
        says_itself = bool(given) and all(isinstance(g, dict) and "last" in g for g in given)
        super().__init__(given, defaults)
        if last is not None and not says_itself and last not in self._names():
            raise ValueError(
                f"SCALE: no parameter is named {last!r}. Pass model.named_parameters() and the "
                "name of the last layer's weight as last=, or last=None for no momentum."
            )

    def _names(self) -> set[str]:
        return {name for group in self.param_groups for name in group.get("param_names", ())}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter with a gradient. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for param, name in zip(group["params"], names, strict=True):
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    if param.ndim >= 2:
                        self._step_matrix(param, name, group)
                    else:
                        self._step_vector(param, group)
        return loss

    def _step_matrix(self, param: torch.Tensor, name: str, group: dict[str, Any]) -> None:
        update = param.grad
        if update is None:
            return
        is_last = name == group["last"] and name != ""
        if is_last and group["momentum"]:
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            update = state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
        places = {"embedding": group["embedding"], "last": group["last"]}
        flat = update.reshape(update.shape[0], -1)
        dim = 0 if is_input_first(name, param.ndim, **places) else 1
        norm = torch.linalg.vector_norm(flat, dim=dim, keepdim=True)
        if group["rms"]:
            norm = norm / flat.shape[dim] ** 0.5
        param.add_((flat / norm.clamp_min(NORM_MIN)).view_as(param), alpha=-group["lr"])

    def _step_vector(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        grad, state = param.grad, self.state[param]
        if grad is None:
            return
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        num_steps, (beta1, beta2) = float(state["step"]), group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**num_steps)).sqrt_().add_(group["eps"])
        param.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**num_steps))
