"""Putting the engine's passes in place of a model's forwards, and taking them away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.blocks import BlockPass
from offload.chunk import Chunk
from offload.engine import Engine
from offload.errors import StateError
from offload.hooks import Autograd, OwnerPass, RootPass
from offload.partition import Partition
from offload.policy import ActivationsPolicy


class Attachment:
    """Everything that is changed on the model and its parameters; `undo` puts it back in reverse
    order.
    """

    def __init__(self, model: nn.Module, engine: Engine, autograd: Autograd) -> None:
        self._model = model
        self._engine = engine
        self._autograd = autograd
        self._undo: list[Callable[[], None]] = []
        self._params = list(model.parameters())
        self.checked = False  # since the last step
        self._calm_hugging_face()
        for chunk in engine.chunks:
            self._hook_params(chunk)

    def undo(self) -> None:
        """Give the model its own methods back. Idempotent."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def replace_forwards(self, parts: Partition, policy: ActivationsPolicy) -> None:
        """Blocks get the block pass, other modules with parameters a fetch around their forward."""
        micro = None if policy.micro_batch == "auto" else policy.micro_batch
        for module, index in parts.blocks:
            chunk = self._engine.chunks[index]
            keep = policy.policy == "keep"
            block = BlockPass(module, chunk, self._autograd, keep=keep, micro_batch=micro)
            self.replace(module, "forward", block)
        for module, indices in parts.owners:
            self.replace(module, "forward", OwnerPass(module, indices, self._autograd))
        root = RootPass(self._model, self._autograd, self._check_unchanged)
        self.replace(self._model, "forward", root)

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow a method on the instance, and remember to uncover it."""
        previous = module.__dict__.get(name)

        def restore() -> None:
            if previous is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = previous

        module.__dict__[name] = value
        self._undo.append(restore)

    def _calm_hugging_face(self) -> None:
        """The engine does its own recompute, and a cache that grows in forward would grow again in
        the replay.
        """
        model: Any = self._model
        for word in ("activation", "gradient"):  # the present name first: the old one warns
            if getattr(model, f"is_{word}_checkpointing", None) is None:
                continue
            if getattr(model, f"is_{word}_checkpointing"):
                getattr(model, f"{word}_checkpointing_disable")()
                self._undo.append(getattr(model, f"{word}_checkpointing_enable"))
            break
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
            self._undo.append(lambda: setattr(config, "use_cache", True))

    def _hook_params(self, chunk: Chunk) -> None:
        for position, param in enumerate(chunk.params):
            param.grad = None
            if param.requires_grad:
                hook = self._autograd.landing_hook(chunk.spec.index, position)
                tensor: Any = param  # its hooks are untyped
                self._undo.append(tensor.register_post_accumulate_grad_hook(hook).remove)

    def refuse_loading(self, is_gathered: Callable[[torch.Tensor], bool]) -> None:
        """load_state_dict() would write into placeholders; refuse before anything is written."""

        def before(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            for key, param in module._parameters.items():
                if param is not None and not is_gathered(param):
                    raise StateError(
                        f"load_state_dict() on the offloaded {prefix}{key}: its weights are in the "
                        "tiers. Load before offload.offload(), or inside engine.gathered(model)."
                    )

        modules: list[Any] = list(self._model.modules())  # their hooks are untyped
        for module in modules:
            self._undo.append(module.register_load_state_dict_pre_hook(before).remove)

    def hook_state_dicts(
        self,
        check: Callable[[nn.Module], None],
        weight_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """state_dict() of the model or of any part gives real tensors, or refuses; never
        placeholders.
        """

        def before(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            check(module)

        def fill(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for key, param in module._parameters.items():
                if param is not None:
                    state[prefix + key] = weight_of(param)

        modules: list[Any] = list(self._model.modules())  # their hooks are untyped
        for module in modules:
            self._undo.append(module.register_state_dict_pre_hook(before).remove)
            self._undo.append(module.register_state_dict_post_hook(fill).remove)

    def _check_unchanged(self) -> None:
        """Once per step: the model must still have the parameters it was wrapped with."""
        self._engine.check_alive()
        if self.checked:
            return
        self.checked = True
        present = list(self._model.parameters())
        if [id(param) for param in present] != [id(param) for param in self._params]:
            known = {id(param) for param in self._params}
            new = [name for name, p in self._model.named_parameters() if id(p) not in known]
            what = f"parameter {new[0]} is new" if new else "a parameter is gone"
            raise StateError(
                f"the model was changed after offload.offload(): {what}. Change the model first, "
                "then offload it."
            )
        for chunk in self._engine.chunks:
            if chunk.num_users and chunk.override is None:
                chunk.check_bound(self._engine.bound_weight(chunk.spec.index))
            for spec, param in zip(chunk.spec.params, chunk.params, strict=True):
                if param.requires_grad and not spec.trainable:
                    raise StateError(
                        f"parameter {spec.name} was frozen when the model was offloaded and "
                        "requires grad now; "
                        "set requires_grad before offload.offload()."
                    )
