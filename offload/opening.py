"""Opening an engine as a policy says: the run's files new or adopted, the slab, the I/O backend."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from offload import heap, numa
from offload.calibrate import DriveProfile, cached_profile, profile_of
from offload.chunk import Chunk
from offload.commit import Commits
from offload.engine import Engine
from offload.errors import PolicyError, StateError, StorageError
from offload.io import PACK_ISA, Limits, choose_backend, default_limits
from offload.manifest import Manifest, encode
from offload.plan import Plan
from offload.policy import OffloadPolicy
from offload.recovery import check_homes, check_rest, check_same_model, homes_of
from offload.runfiles import read_manifest
from offload.runfolder import is_manifest
from offload.slots import Slab
from offload.store import ChunkStore
from offload.swapfile import MANIFEST_NAME, RunFiles
from offload.timeline import Timeline
from offload.transfer import Device

logger = logging.getLogger("offload")
RESUME = "resume"
PACK_BANDWIDTH = {"avx512": 5e9, "avx2": 4e9, "portable": 0.0}  # bytes/s: bench/pack.py


def manifest_to_restore(
    weights: str | Path | None, plan: Plan, model: nn.Module
) -> Manifest | None:
    """The manifest of a checkpoint that `weights` names, or None where it names none.

    Raises StorageError where it is broken, StateError for another model.
    """
    if weights in (None, RESUME, "init"):
        return None
    if not is_manifest(Path(str(weights)) / MANIFEST_NAME):
        return None
    manifest = read_manifest(Path(str(weights)))
    where = f"the {manifest.kind} in {weights}"
    check_same_model(manifest, plan.specs, plan.fmt, where)
    check_rest(manifest, model, where)
    return manifest


def manifest_to_resume(
    policy: OffloadPolicy, weights: str | Path | None, plan: Plan, model: nn.Module
) -> Manifest | None:
    """The manifest of the run to go on with, or None where a new one begins.

    Raises StorageError where there is none or it is broken, StateError for another model.
    """
    nvme = policy.tiers.nvme
    if weights != RESUME:
        return None
    if nvme is None or not policy.commit_every:
        raise PolicyError("weights='resume' goes on with a committed run: set durability: step.")
    manifest = read_manifest(nvme.paths[0])
    where = f"the run in {nvme.paths[0]}"
    check_same_model(manifest, plan.specs, plan.fmt, where)
    check_homes(manifest, plan, where)
    check_rest(manifest, model, where)
    if len(manifest.file_nbytes) != len(nvme.paths):
        raise PolicyError(
            f"tiers.nvme.paths names {len(nvme.paths)} folders, {where} has "
            f"{len(manifest.file_nbytes)}. Name them all, in the order of the run; to move to "
            "other drives, start from a checkpoint of it (`offload checkpoint`)."
        )
    return manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Drives:
    """What is known of the policy's paths before the plan: how to reach them, how fast they are."""

    backend: str
    reason: str
    fell_back: bool
    profiles: tuple[DriveProfile, ...]  # empty where one is not known
    num_devices: int = 1  # behind all paths

    @property
    def weights(self) -> list[float]:
        """The speeds of several paths, where they are known; else nothing."""
        known = self.profiles if len(self.profiles) > 1 else ()
        return [profile.mixed_bandwidth for profile in known]

    @property
    def packing_pays(self) -> bool:
        """Whether the drives are slower than one update worker that packs; so is one that nobody
        has measured.
        """
        speeds = [profile.mixed_bandwidth for profile in self.profiles]
        return sum(speeds) * self.num_devices / max(len(speeds), 1) < PACK_BANDWIDTH[PACK_ISA]

    @property
    def limits(self) -> Limits | None:
        """One queue serves all drives: blocks that suit the slowest, and room for all of them."""
        if not self.profiles:
            return None
        slowest = min(self.profiles, key=lambda profile: profile.mixed_bandwidth)
        depth = sum(profile.depth for profile in self.profiles)
        return Limits(depth=depth, block_nbytes=slowest.block_nbytes)


def settle(
    policy: OffloadPolicy, drives: Drives | None, weights: str | Path | None
) -> OffloadPolicy:
    """The policy with what it leaves open decided by the drives: `pack`. A run that is gone on with
    stays as it is packed, tile by tile.
    """
    nvme = policy.tiers.nvme
    if nvme is None or drives is None or not nvme.checksum:
        return policy
    run_numel = (
        _packed_run_numel(nvme.paths[0]) if weights == RESUME and nvme.pack is not False else 0
    )
    pack = nvme.pack if nvme.pack is not None else drives.packing_pays or run_numel > 0
    if run_numel and run_numel != policy.optimizer.tile_numel:
        logger.info("tiles of %d elements, as the run in %s is packed", run_numel, nvme.paths[0])
        optimizer = policy.optimizer.model_copy(update={"tile_numel": run_numel})
        policy = policy.model_copy(update={"optimizer": optimizer})
    tiers = policy.tiers.model_copy(update={"nvme": nvme.model_copy(update={"pack": pack})})
    return policy.model_copy(update={"tiers": tiers})


def _packed_run_numel(folder: Path) -> int:
    """Elements in a run of what is committed in a folder; 0 where nothing there is packed."""
    try:
        record = read_manifest(folder).checksums
    except StorageError:  # whoever goes on with it will say so
        return 0
    return record.run_numel if record is not None else 0


def find_drives(policy: OffloadPolicy) -> Drives | None:
    """The drives that a policy names, or None where it names none."""
    nvme = policy.tiers.nvme
    if nvme is None:
        return None
    backend, reason = choose_backend(nvme.io)
    fell_back = nvme.io == "auto" and backend != "uring"
    num_devices = len({_existing(path).stat().st_dev for path in nvme.paths})
    profiles = tuple(_profiles(nvme.paths, backend))
    return Drives(backend, reason, fell_back, profiles, num_devices)


def _profiles(paths: Sequence[Path], backend: str) -> list[DriveProfile]:
    """What is known of the drives behind the paths; nothing where something is missing.

    Several drives are measured where they were not, because planes are shared out by their speed:
    two seconds each, once. One drive is measured by `offload doctor` only.
    """
    places = [_existing(path) for path in paths]
    devices = {place.stat().st_dev for place in places}
    profiles = [cached_profile(place, backend) for place in places]
    if len(devices) > 1:
        try:
            profiles = [
                p or profile_of(place, backend) for p, place in zip(profiles, places, strict=True)
            ]
        except (StorageError, OSError) as error:
            logger.warning(
                "the drives share planes equally, because one was not measured: %s", error
            )
            return []
    return [profile for profile in profiles if profile] if all(profiles) else []


def _existing(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def open_engine(
    policy: OffloadPolicy,
    plan: Plan,
    params: Sequence[Sequence[nn.Parameter]],
    *,
    drives: Drives | None,
    device: Device,
    timeline: Timeline,
    poison: bool,
    manifest: Manifest | None,
) -> Engine:
    """An engine with its slab, and its files where the plan needs some."""
    chunks = [Chunk(s, p) for s, p in zip(plan.specs, params, strict=True)]
    store, used = None, drives if plan.uses_files else None
    nvme = policy.tiers.nvme
    if used is not None:
        level = logging.WARNING if used.fell_back else logging.INFO
        logger.log(level, "I/O: %s: %s", used.backend, used.reason)
    backend = used.backend if used is not None else "threads"
    limits = used.limits if used is not None else None
    paths = nvme.paths if used is not None and nvme is not None else ()
    limits = _near(paths, device, limits or default_limits(backend))
    if device.is_host:  # gradients and logits are then buffers of this process
        heap.fix_thresholds()
    slab = Slab(plan.slab_nbytes)
    try:
        if used is not None and nvme is not None:
            store = make_store(plan, nvme.paths, slab, _run_files(plan, manifest))
        slab.populate()
        device.register(slab)
        engine = Engine(
            plan,
            chunks,
            slab=slab,
            store=store,
            nvme_budget=nvme.budget if nvme else None,
            homes=homes_of(manifest) if manifest else None,
            backend=backend,
            limits=limits,
            device=device,
            timeline=timeline,
            poison=poison,
        )
    except BaseException:
        if store is not None:
            store.close(keep=manifest is not None)
            store.remove_folders()
        slab.close()
        raise
    if manifest is not None and nvme is not None:
        _check_unchanged(engine, manifest, nvme.paths[0])
    return engine


def _near(paths: Sequence[Path], device: Device, limits: Limits) -> Limits:
    """The limits with the CPUs that are near the drives and the device, where that matters."""
    cpus = numa.worker_cpus([_existing(path) for path in paths], device.pci_address)
    if cpus is not None:
        logger.info("I/O and updates run on CPUs %s, near the drives", sorted(cpus))
    return dataclasses.replace(limits, cpus=cpus)


def _check_unchanged(engine: Engine, manifest: Manifest, folder: Path) -> None:
    """The manifest was read before the locks were taken. Whoever held them may have committed and
    ended in between, and have written over what the older manifest names.
    """
    try:
        if encode(read_manifest(folder)) != encode(manifest):
            raise StateError(
                f"the run in {folder} was in use a moment ago, and committed. Start again."
            )
    except BaseException:
        engine.close(keep=True)
        raise


def make_store(
    plan: Plan, paths: Sequence[Path], slab: Slab, run: RunFiles | None = None
) -> ChunkStore:
    """The store of a plan, its checksums in the slab."""
    table = slab.carve("checksums", plan.table_nbytes) if plan.table_nbytes else None
    return ChunkStore(
        paths,
        run=run,
        checksum_nbytes=plan.checksum_nbytes,
        table=table,
        packs=plan.packs,
        weights=plan.weights,
    )


def _run_files(plan: Plan, manifest: Manifest | None) -> RunFiles | None:
    if manifest is not None:
        return RunFiles(manifest.run, manifest.used_nbytes())
    return RunFiles(uuid.uuid4().hex) if plan.commit_every else None


def open_commits(engine: Engine, manifest: Manifest | None) -> Commits | None:
    """The commits of an engine whose plan has some."""
    store = engine.store
    if store is None or store.run is None:
        return None
    commits = Commits(engine, store, store.run.run)
    if manifest is not None:
        commits.continue_from(manifest)
    return commits
