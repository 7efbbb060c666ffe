"""What tests of bad input share: a refusal that leaves the model as it was, a run that works."""

from typing import Any

import pytest
from parity import Recipe, assert_same, bits, run_plain, train
from torch import nn
from zoo import ZOO

import offload

LLAMA = ZOO["llama"]


def snapshot(model: nn.Module) -> dict[str, str]:
    return {name: bits(p) for name, p in model.named_parameters()}


def refused(
    policy: Any, error: type[Exception], match: str, model: nn.Module | None = None
) -> Exception:
    """offload() raises `error` and leaves the model as it was, ready for plain use."""
    model = LLAMA.make_model() if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        offload.offload(model, policy)
    assert isinstance(caught.value, offload.OffloadError)
    assert snapshot(model) == before
    return caught.value


def works(policy: Any) -> None:
    with offload.offload(LLAMA.make_model(), policy) as engine:
        got = train(engine, LLAMA, Recipe(steps=1), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=1), "exact").record)
