"""Policy: what the YAML may say, and that every refusal names the place and the way out."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import OffloadError, PolicyError
from offload.policy import OffloadPolicy, load_policy, parse_nbytes, policy_schema

# Tests share their cores, so no example is too slow.
UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KIB, MIB, GIB, TIB = (1024**power for power in range(1, 5))
YAML = """
tiers:
  gpu:  {device: auto, budget: 20GiB}
  cpu:  {budget: 48GiB, pin: auto}
  nvme: {paths: [/mnt/a/offload, /mnt/b/offload], budget: 800GiB, io: auto, checksum: false}
state: {format: exact}
optimizer: {update: auto}
activations: {policy: auto, micro_batch: auto}
durability: off
"""


def minimal(**sections: object) -> dict[str, object]:
    return {"tiers": {"cpu": {"budget": "4GiB"}}, **sections}


def nested(path: str, value: object) -> dict[str, Any]:
    """The smallest otherwise valid tree in which one key path has a value."""
    tree: dict[str, Any] = {"tiers": {"cpu": {"budget": "4GiB"}}}
    if path.startswith("tiers.nvme.") and path != "tiers.nvme.paths":
        tree["tiers"]["nvme"] = {"paths": ["/mnt/a"]}
    node = tree
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return tree


def refusal(source: Any, *overrides: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(source, overrides)
    return str(caught.value)


def lookup(policy: OffloadPolicy, path: str) -> object:
    value: object = policy
    for key in path.split("."):
        value = getattr(value, key)
    return value


# What is read


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tiers.yaml"
    file.write_text(YAML)
    policy = load_policy(file)
    assert policy == load_policy(str(file))
    assert (policy.tiers.gpu.device, policy.tiers.gpu.budget) == ("auto", 20 * GIB)
    assert (policy.tiers.cpu.budget, policy.tiers.cpu.pin) == (48 * GIB, "auto")
    assert policy.tiers.nvme is not None
    assert policy.tiers.nvme.paths == (Path("/mnt/a/offload"), Path("/mnt/b/offload"))
    assert policy.tiers.nvme.budget == 800 * GIB
    assert policy.durability == "off"


def test_only_the_cpu_budget_is_required() -> None:
    policy = load_policy(minimal())
    assert policy.model_dump() == {
        "tiers": {
            "gpu": {"device": "auto", "budget": None},
            "cpu": {"budget": 4 * GIB, "pin": "auto", "weight_slots": None, "grad_slots": None},
            "nvme": None,
        },
        "state": {"format": "exact"},
        "optimizer": {
            "kind": "adamw",
            "name": None,
            "options": {},
            "update": "auto",
            "nonfinite": "raise",
            "tile_numel": 262144,
        },
        "activations": {"policy": "auto", "micro_batch": "auto"},
        "durability": "off",
    }
    nvme = load_policy(nested("tiers.nvme.paths", ["/mnt/a"])).tiers.nvme
    assert nvme is not None
    assert (nvme.budget, nvme.io, nvme.checksum) == (None, "auto", True)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("tiers.gpu.device", "cuda:3", "cuda:3"),
        ("tiers.gpu.device", "standin", "standin"),
        ("tiers.gpu.budget", None, None),
        ("optimizer.nonfinite", "skip", "skip"),
        ("tiers.cpu.budget", 1.0e9, 10**9),
        ("tiers.cpu.budget", "1.5GB", 1_500_000_000),
        ("tiers.cpu.pin", True, True),
        ("tiers.cpu.pin", False, False),
        ("tiers.cpu.weight_slots", 1, 1),
        ("tiers.nvme.io", "threads", "threads"),
        ("state.format", "fp32", "fp32"),
        ("optimizer.update", "eager", "eager"),
        ("optimizer.tile_numel", 4096, 4096),
        ("activations.policy", "keep", "keep"),
        ("activations.micro_batch", 2, 2),
        ("durability", "off", "off"),
        ("durability", False, "off"),  # how YAML reads a bare off
    ],
)
def test_accepted_values(path: str, value: object, expected: object) -> None:
    got = lookup(load_policy(nested(path, value)), path)
    assert got == expected and type(got) is type(expected)


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    policy = load_policy(nested("tiers.nvme.paths", ["~/swap", "here", Path("/there")]))
    assert policy.tiers.nvme is not None
    assert policy.tiers.nvme.paths == (tmp_path / "me/swap", tmp_path / "here", Path("/there"))


def test_a_policy_is_frozen_and_hashable() -> None:
    policy = load_policy(minimal())
    with pytest.raises(pydantic.ValidationError):
        policy.tiers.cpu.budget = 1
    assert hash(policy) == hash(load_policy(minimal()))


def test_any_mapping_will_do() -> None:
    tiers = types.MappingProxyType({"cpu": types.MappingProxyType({"budget": 7})})
    assert load_policy(types.MappingProxyType({"tiers": tiers})).tiers.cpu.budget == 7


def test_a_policy_passes_through() -> None:
    policy = load_policy(YAML_TREE)
    assert load_policy(policy) == policy
    changed = load_policy(policy, ["tiers.nvme.io=threads"])
    assert changed.tiers.nvme is not None and changed.tiers.nvme.io == "threads"
    assert policy.tiers.nvme is not None and policy.tiers.nvme.io == "auto"


YAML_TREE: Mapping[str, object] = nested("tiers.nvme.paths", ["/mnt/a", "/mnt/b"])


def test_overrides_change_keys_in_order() -> None:
    policy = load_policy(
        minimal(),
        [
            "tiers.cpu.budget=1GiB",
            "tiers.cpu.budget = 2GiB",
            "tiers.cpu.pin=false",
            "tiers.nvme.paths=[/mnt/a, /mnt/b]",
            "activations={policy: keep, micro_batch: 4}",
            "activations.micro_batch=8",
            "durability=off",
        ],
    )
    assert (policy.tiers.cpu.budget, policy.tiers.cpu.pin) == (2 * GIB, False)
    assert policy.tiers.nvme is not None and len(policy.tiers.nvme.paths) == 2
    assert (policy.activations.policy, policy.activations.micro_batch) == ("keep", 8)


def test_an_override_can_remove_a_tier() -> None:
    assert load_policy(YAML_TREE, ["tiers.nvme=null"]).tiers.nvme is None


def test_overrides_leave_the_callers_mapping_alone() -> None:
    tree = minimal(state={"format": {"deep": {"deeper": 1}}})
    before = json.dumps(tree)
    load_policy(tree, ["tiers.cpu.budget=1GiB", "state.format=fp32"])
    refusal(tree, "state.format.deep.deeper=2")
    assert json.dumps(tree) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tiers.cpu.budget", ["tiers.cpu.budget=24GiB"]),
        ("=4GiB", ["key.path=value"]),
        ("tiers..budget=4GiB", ["key.path=value"]),
        ("tiers.cpu.budget=[4GiB", ["not valid YAML"]),
        ("tiers.cpu.budget.most=4GiB", ["tiers.cpu.budget", "'4GiB'", "no keys below it"]),
        ("tiers.cpu.budgett=4GiB", ["tiers.cpu.budgett", "did you mean tiers.cpu.budget?"]),
        ("tiers.cpu.budget=lots", ["tiers.cpu.budget: 'lots'"]),
        ("tiers.nvme={paths: []}", ["tiers.nvme.paths: ", "1 to 64"]),
        ("state=null", ["state: None", "a mapping"]),
    ],
)
def test_a_bad_override_is_named(override: str, words: list[str]) -> None:
    text = refusal(minimal(), override)
    assert f"override {override!r}" in text
    assert all(word in text for word in words), text


def test_only_the_guilty_line_names_the_override() -> None:
    lines = refusal(minimal(state={"format": "x"}), "tiers.cpu.pin=maybe").splitlines()
    assert ["override" in line for line in lines] == [True, False]


# What is refused


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tiers.gpu.device", "tpu"),
        ("tiers.gpu.device", "cuda:"),
        ("tiers.gpu.device", 0),
        ("tiers.gpu.budget", "many"),
        ("tiers.gpu.budget", 0),
        ("tiers.cpu.budget", None),
        ("tiers.cpu.budget", True),
        ("tiers.cpu.budget", "-1GiB"),
        ("tiers.cpu.budget", [1]),
        ("tiers.cpu.pin", "yes"),
        ("tiers.cpu.pin", 1),
        ("tiers.cpu.weight_slots", 0),
        ("tiers.cpu.grad_slots", "2"),
        ("tiers.nvme.paths", "/mnt/a"),
        ("tiers.nvme.paths", []),
        ("tiers.nvme.paths", [""]),
        ("tiers.nvme.paths", [3]),
        ("tiers.nvme.paths", None),
        ("tiers.nvme.paths", ["/mnt/a", "/mnt/b/../a"]),
        ("tiers.nvme.paths", ["~no-such-user-here/x"]),
        ("tiers.nvme.paths", [f"/mnt/{index}" for index in range(65)]),
        ("tiers.nvme.io", "libaio"),
        ("tiers.nvme.checksum", 1),
        ("state.format", "fp16"),
        ("state.format", None),
        ("optimizer.update", True),
        ("optimizer.tile_numel", 5000),
        ("optimizer.tile_numel", 0),
        ("optimizer.tile_numel", 2**25),
        ("optimizer.tile_numel", 8192.0),
        ("activations.policy", "drop"),
        ("activations.micro_batch", 0),
        ("activations.micro_batch", True),
        ("durability", "sometimes"),
        ("tiers.gpu", None),
        ("tiers.cpu", "48GiB"),
        ("state", "exact"),
    ],
)
def test_a_bad_value_is_named_with_its_path_and_what_is_accepted(path: str, value: object) -> None:
    text = refusal(nested(path, value))
    assert text.startswith(f"policy mapping: {path}: ")
    assert "\n" not in text  # one problem, one line
    assert "accepted: " in text
    assert repr(value)[:10] in text


@pytest.mark.parametrize(
    ("path", "value", "available"),
    [
        ("activations.policy", "offload", "recompute"),
    ],
)
def test_what_does_not_exist_yet_is_refused_with_what_does(
    path: str, value: object, available: str
) -> None:
    text = refusal(nested(path, value))
    assert f"{path}: {value!r} is not available yet; accepted: " in text
    assert available in text.partition("accepted: ")[2]


@pytest.mark.parametrize(
    ("path", "meant", "accepted"),
    [
        ("tiers.cpu.budgett", "tiers.cpu.budget", "budget, pin, weight_slots, grad_slots"),
        ("tiers.gpu.devise", "tiers.gpu.device", "device, budget"),
        ("tier", "tiers", "tiers, state, optimizer, activations, durability"),
        ("activations.microbatch", "activations.micro_batch", "policy, micro_batch"),
        ("nvme", "tiers.nvme", "tiers, state, optimizer, activations, durability"),
        ("format", "state.format", "tiers, state, optimizer, activations, durability"),
    ],
)
def test_a_misspelt_key_gets_the_nearest(path: str, meant: str, accepted: str) -> None:
    text = refusal(nested(path, 1))
    assert f"{path}: unknown key (value 1); did you mean {meant}? accepted keys: {accepted}" in text


def test_a_key_like_no_other_gets_the_list_only() -> None:
    text = refusal(minimal(zebra={"deep": 1}))
    assert "zebra: unknown key" in text and "did you mean" not in text
    assert "accepted keys: tiers, state" in text


@pytest.mark.parametrize("source", [{}, {"tiers": {}}, {"tiers": {"cpu": {}}}])
def test_what_is_missing_is_named(source: dict[str, object]) -> None:
    assert ": missing; accepted: " in refusal(source)


def test_a_key_that_is_no_string_is_unknown() -> None:
    assert "1: unknown key" in refusal({**minimal(), 1: 2})


def test_all_problems_are_listed_once() -> None:
    text = refusal({"tiers": {"cpu": {"budget": "x", "pin": "x"}, "gpu": {"device": "x"}}, "x": 1})
    paths = [
        line.removeprefix("policy mapping:").split(":")[0].strip() for line in text.split("\n")
    ]
    assert sorted(paths) == ["tiers.cpu.budget", "tiers.cpu.pin", "tiers.gpu.device", "x"]


def test_long_values_are_cut() -> None:
    assert len(refusal(nested("tiers.gpu.device", "x" * 10_000))) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "None is not a mapping; accepted keys: tiers"),
        (b"- tiers", "is not a mapping"),
        (b"tiers: {cpu: {budget: 1", "not valid YAML"),
        (b"tiers: \x80\xff", "not valid YAML"),
        (b"a: 2024-99-99", "not valid YAML"),
        (b"tiers: {cpu: {budget: 1}}\ntiers: {cpu: {budget: 2}}", "'tiers' is given twice"),
        (b"tiers: {cpu: {budget: 1, budget: 2}}", "'budget' is given twice"),
        (b"tiers: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"tiers: &a {cpu: *a}", "tiers.cpu.budget: missing"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    text = refusal(file)
    assert text.startswith(f"policy {file}: ") and words in text


@pytest.mark.parametrize("source", ["none.yaml", Path("none.yaml"), ".", "nul\0.yaml", "a" * 5000])
def test_an_unreadable_file_is_named(source: str | Path) -> None:
    assert f"policy {source}: cannot be read" in refusal(source)


def test_a_cyclic_mapping_is_refused() -> None:
    tree: dict[str, object] = minimal()
    tree["state"] = tree
    assert "state.tiers: unknown key" in refusal(tree)


def test_errors_are_offload_and_value_errors() -> None:
    with pytest.raises(OffloadError):
        load_policy({})
    with pytest.raises(ValueError):
        parse_nbytes("x")


KEYS = st.sampled_from(
    ["tiers", "gpu", "cpu", "nvme", "budget", "paths", "state", "format", "durability", "x", ""]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: st.dictionaries(KEYS, children) | st.lists(children),
    max_leaves=12,
)


@UNHURRIED
@given(st.dictionaries(KEYS, TREES), st.lists(st.text(alphabet="tiers.cpu=[]{}: 1", max_size=20)))
def test_any_tree_is_read_or_refused(tree: dict[str, Any], overrides: list[str]) -> None:
    try:
        assert load_policy(tree, overrides).tiers.cpu.budget > 0
    except PolicyError as error:
        assert str(error).startswith(("policy mapping: ", "override "))


def test_the_schema_describes_every_key() -> None:
    schema = policy_schema()
    json.dumps(schema)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["required"] == ["tiers"]
    assert schema["$defs"]["CpuPolicy"]["required"] == ["budget"]
    assert schema["$defs"]["StatePolicy"]["properties"]["format"]["enum"] == [
        "exact",
        "fp32",
        "bf16",
        "int8",
    ]
    kinds = [item["type"] for item in schema["$defs"]["CpuPolicy"]["properties"]["budget"]["anyOf"]]
    assert kinds == ["integer", "string"]
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert all(key.get("description") for key in section["properties"].values())
