"""Where every byte will lie, decided before training starts. Pure functions: specs and budgets in,
Plan out.

RAM is a static cache of NVMe. A byte of weight pinned there saves three bytes of traffic a step
(read twice, written once), a byte of any other plane saves two; static pinning beats LRU for a loop
that visits everything (research: GreedySnake, FlexGen). What does not fit is refused here, with the
sum and the nearest setting that fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from offload import space
from offload.chunk import ChunkSpec
from offload.errors import BudgetError
from offload.extents import Runs, runs_of, shares, table_nbytes
from offload.formats import GRAD_PLANES, NUMEL_MULTIPLE, Plane, StateFormat
from offload.policy import OffloadPolicy, format_nbytes, short_nbytes
from offload.schedule import count_loads, default_order
from offload.slots import HUGE_PAGE_NBYTES, round_up
from offload.space import PoolSpec as PoolSpec
from offload.swapfile import ALIGN_NBYTES
from offload.update import tile_buffer_nbytes
from offload.wear import check_daily_limit, plan_lines

WEIGHT_SLOTS_TARGET = 3  # one in use, one arriving, one being updated
GRAD_SLOTS_TARGET = 3  # one landing, two waiting for the update worker
CHECKSUM_NBYTES = 64 << 10  # 4 bytes of RAM for each, and what a read has to bring to be checked
_MIN_TILE_NUMEL = 16384
_TORCH_TILE_NUMEL = 32768  # no tile is ever used then, and checksums keep their block size
SCRATCH = "optimizer scratch"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All placement decisions of a run. `str(plan)` is for people."""

    specs: tuple[ChunkSpec, ...]
    fmt: StateFormat
    pools: tuple[PoolSpec, ...]
    pinned: frozenset[tuple[int, Plane]]
    grads_resident: bool
    eager: bool
    tile_numel: int
    tile_nbytes: int
    cpu_budget_nbytes: int
    uses_nvme: bool
    weights: tuple[float, ...] = ()  # the speeds of the paths: planes are shared out by them
    checksum_nbytes: int = 0  # one checksum for so many bytes on NVMe; 0: none
    packs: bool = False  # floats on NVMe are packed where an update writes them
    commit_every: int = 0  # steps from one commit to the next; 0: a crash loses the run
    rated_nbytes: tuple[int, ...] = ()  # endurance by drive; empty: not known
    max_writes_per_day: int | None = None  # bytes to one drive

    def pool_of(self, index: int) -> PoolSpec:
        return next(pool for pool in self.pools if index in pool.members)

    def terms(self) -> list[tuple[str, int]]:
        """The slab, item by item, in bytes; the engine carves exactly these arenas."""
        rows = [("update tiles", self.tile_nbytes)]
        for pool in self.pools:
            rows.append((f"weight slots {pool.name}", pool.slot_nbytes * pool.num_weight_slots))
            rows.append((f"gradient slots {pool.name}", pool.slot_nbytes * pool.num_grad_slots))
        for plane in self.fmt.state_planes:
            rows.append((f"pinned {plane.value}", self._pinned_nbytes(plane)))
        rows.append((SCRATCH, self.scratch_nbytes))
        rows.append(("checksums", self.table_nbytes))
        return [row for row in rows if row[1]]

    @property
    def table_nbytes(self) -> int:
        """RAM for the checksums of everything on NVMe."""
        sizes = [
            spec.nbytes(plane, self.fmt)
            for spec in self.specs
            for plane in self.nvme_planes(spec)
            for _ in range(self.num_extents(spec, plane))
        ]
        return table_nbytes(sizes, self.num_paths, self.checksum_nbytes, packs=self.packs)

    def runs(self, plane: Plane) -> Runs | None:
        """How a plane is packed on NVMe: tile by tile, as updates write it."""
        return runs_of(self.fmt, plane, self.tile_numel if self.packs else 0)

    def _pinned_nbytes(self, plane: Plane) -> int:
        return sum(
            self.specs[index].nbytes(plane, self.fmt)
            for index, which in self.pinned
            if which is plane
        )

    @property
    def work_nbytes(self) -> int:
        """Of the scratch: what a torch optimizer's step of one parameter works on."""
        return space.work_nbytes(self.specs, self.fmt)

    @property
    def scratch_nbytes(self) -> int:
        """For a step of a torch optimizer: the planes of one chunk that do not rest in RAM, and
        work_nbytes. See [Note: torch step].
        """
        moving = {
            s.index: [p for p in self.nvme_planes(s) if (s.index, p) not in self.pinned]
            for s in self.specs
        }
        return space.scratch_nbytes(self.specs, self.fmt, moving)

    @property
    def beside_nbytes(self) -> int:
        """RAM under the budget that is not the slab's: what an optimizer needs beside it."""
        return space.beside_nbytes(self.specs, self.fmt)

    @property
    def slab_nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.terms())

    @property
    def state_nbytes(self) -> int:
        """Bytes of all persistent planes on all tiers."""
        return sum(
            spec.nbytes(plane, self.fmt)
            for spec in self.specs
            for plane in spec.state_planes(self.fmt)
        )

    @property
    def postponed(self) -> int | None:
        """The chunk whose eager update waits for the end of backward; see [Note: postponed]."""
        last = max((s.index for s in self.specs if not s.is_small), default=None)
        if last is None or not (self.uses_nvme and self.specs[last].trainable):
            return None
        return last if self.pool_of(last).num_grad_slots >= GRAD_SLOTS_TARGET else None

    def nvme_planes(self, spec: ChunkSpec) -> list[Plane]:
        """The planes of a chunk that need an extent: state that is not pinned or shall survive, and
        room for spilled gradients.
        """
        planes = [
            plane
            for plane in spec.state_planes(self.fmt)
            if self.commit_every or (spec.index, plane) not in self.pinned
        ]
        if spec.trainable and not self.grads_resident:
            planes += self.fmt.grad_planes
        return planes

    @property
    def num_paths(self) -> int:
        return len(self.weights)

    def num_extents(self, spec: ChunkSpec, plane: Plane) -> int:
        """Two for what changes and must survive a crash: see [Note: two extents] in store.py."""
        return 2 if self.commit_every and spec.trainable and plane not in GRAD_PLANES else 1

    @property
    def uses_files(self) -> bool:
        """Whether there are swap files: for planes that lie there, or to survive a crash."""
        return self.uses_nvme or self.commit_every > 0

    @property
    def nvme_nbytes(self) -> int:
        header = ALIGN_NBYTES * self.num_paths if self.commit_every else 0
        return header + sum(
            spec.nbytes(plane, self.fmt) * self.num_extents(spec, plane)
            for spec in self.specs
            for plane in self.nvme_planes(spec)
        )

    @property
    def commit_nbytes(self) -> int:
        """What a commit writes beside what updates have written: the pinned planes that change."""
        if not self.commit_every:
            return 0
        return sum(
            self.specs[index].nbytes(plane, self.fmt)
            for index, plane in self.pinned
            if self.specs[index].trainable
        )

    def traffic(self, order: Sequence[int] | None = None) -> tuple[int, int]:
        """Predicted (bytes read, bytes written) on NVMe per optimizer step with one backward, in
        steady state.
        """
        order = list(
            order
            if order is not None
            else default_order([s.index for s in self.specs if not s.is_small])
        )
        read = 0
        for pool in self.pools:
            members = [i for i in pool.members if (i, Plane.WEIGHT) not in self.pinned]
            loads = count_loads([i for i in order if i in members], pool.num_weight_slots)
            read += sum(loads[i] * self.specs[i].nbytes(Plane.WEIGHT, self.fmt) for i in loads)
        for spec in self.specs:
            read += self._update_read(spec)
        return read, sum(self.written_by_drive())

    def written_by_drive(self, *, at_most: bool = False) -> tuple[int, ...]:
        """Predicted bytes written to each drive per optimizer step, on average; with `at_most`, of
        a step that commits.
        """
        totals, commits = [0] * self.num_paths, [0] * self.num_paths
        for spec in self.specs:
            if spec.trainable and self.uses_files:
                for plane in self._written_planes(spec):
                    self._stripe_onto(totals, spec, plane)
                for plane in spec.state_planes(self.fmt):
                    if self.commit_every and (spec.index, plane) in self.pinned:
                        self._stripe_onto(commits, spec, plane)
        every = 1 if at_most else max(self.commit_every, 1)
        return tuple(n + commit // every for n, commit in zip(totals, commits, strict=True))

    def _stripe_onto(self, totals: list[int], spec: ChunkSpec, plane: Plane) -> None:
        align = self.checksum_nbytes or ALIGN_NBYTES
        nbytes_by_drive = shares(spec.nbytes(plane, self.fmt), self.weights, align)
        for drive, nbytes in enumerate(nbytes_by_drive):
            totals[drive] += nbytes

    def _written_planes(self, spec: ChunkSpec) -> list[Plane]:
        """The planes of a trainable chunk that a step writes to its extents, but for a commit."""
        planes = [p for p in spec.state_planes(self.fmt) if (spec.index, p) not in self.pinned]
        return planes if self.eager or self.grads_resident else [*planes, Plane.GRAD]

    def _update_read(self, spec: ChunkSpec) -> int:
        """What a chunk's update reads beside the weights, which a fetch pays for."""
        if not (self.uses_nvme and spec.trainable):
            return 0
        written = self._written_planes(spec)
        read = sum(spec.nbytes(p, self.fmt) for p in written if p is not Plane.WEIGHT)
        if self.eager and spec.index == self.postponed and Plane.WEIGHT in written:
            read += spec.nbytes(Plane.WEIGHT, self.fmt)  # its slot has gone to others by then
        return read

    def __str__(self) -> str:
        num_params = sum(spec.num_params for spec in self.specs)
        lines = [
            f"{num_params / 1e6:.1f} M parameters in {len(self.specs)} chunks, format "
            f"{self.fmt.name} "
            f"({space.state_itemsize(self.specs, self.fmt):g} B/param): "
            f"{short_nbytes(self.state_nbytes)} of state",
            f"CPU slab {short_nbytes(self.slab_nbytes)} of "
            f"{short_nbytes(self.cpu_budget_nbytes)} budget:",
        ]
        lines += [f"  {name:<28} {short_nbytes(nbytes):>12}" for name, nbytes in self.terms()]
        if self.beside_nbytes:
            lines.append(space.beside_line(self.specs, self.beside_nbytes, self.fmt))
        if self.uses_files:
            read, write = self.traffic()
            what = "swap files, two versions of what changes" if self.commit_every else "swap files"
            lines.append(f"NVMe {short_nbytes(self.nvme_nbytes)} of {what}")
            about = "at most" if self.packs else "about"
            lines.append(
                f"  per step {about} {short_nbytes(read)} read, {short_nbytes(write)} written "
                f"({read / num_params:.1f} + {write / num_params:.1f} B/param)"
            )
            step = self.written_by_drive()
            lines += [
                f"  {x}" for x in plan_lines(step, self.rated_nbytes, self.max_writes_per_day)
            ]
        if self.commit_every:
            often = f"{self.commit_every} steps" if self.commit_every > 1 else "step"
            lines.append(
                f"  a commit every {often} writes "
                f"{short_nbytes(self.commit_nbytes)} of planes that rest in RAM"
            )
        if not self.uses_nvme:
            lines.append("NVMe not used: everything rests in RAM")
        return "\n".join(lines)


def make_plan(
    specs: Sequence[ChunkSpec],
    fmt: StateFormat,
    policy: OffloadPolicy,
    *,
    host_compute: bool,
    weights: Sequence[float] = (),
) -> Plan:
    """Place every plane under the budgets of `policy`.

    Raises BudgetError with the itemised sum and the smallest budget that would do, PolicyError
    where a step writes more than tiers.nvme.max_writes_per_day.
    """
    specs = [spec.aligned(fmt) for spec in specs]
    tile_numel = min(policy.optimizer.tile_numel, max(spec.numel for spec in specs))
    if space.steps_in_torch(fmt):
        tile_numel = min(tile_numel, _TORCH_TILE_NUMEL)
    while tile_numel > _MIN_TILE_NUMEL:  # the tiles take at most an eighth of the budget
        if tile_buffer_nbytes(tile_numel) * 8 <= policy.tiers.cpu.budget:
            break
        tile_numel //= 2
    while True:
        try:
            tile = round_up(tile_numel, fmt.numel_multiple)
            plan = _Planner(tuple(specs), fmt, policy, host_compute, tile, weights).plan()
            check_daily_limit(plan.written_by_drive(at_most=True), plan.max_writes_per_day)
            return plan
        except BudgetError:
            if tile_numel <= _MIN_TILE_NUMEL:
                raise  # with the smallest tiles: the budget that it names is enough
            tile_numel = max(tile_numel // 2, _MIN_TILE_NUMEL)


class _Planner:
    """Tries the layouts from the fastest to the smallest, and takes the first that fits."""

    def __init__(
        self,
        specs: tuple[ChunkSpec, ...],
        fmt: StateFormat,
        policy: OffloadPolicy,
        host_compute: bool,
        tile_numel: int,
        weights: Sequence[float],
    ) -> None:
        nvme = policy.tiers.nvme
        self.weights = tuple(weights) or (1.0,) * (len(nvme.paths) if nvme is not None else 0)
        self.specs, self.fmt, self.policy = specs, fmt, policy
        self.host_compute = host_compute
        self.beside_nbytes = space.beside_nbytes(specs, fmt)
        self.budget = policy.tiers.cpu.budget - self.beside_nbytes  # for the slab
        self.has_nvme = policy.tiers.nvme is not None
        self.may_pin = policy.tiers.cpu.pin is not False
        self.num_gpu_slots = self._fit_gpu_slots()
        self.tile_numel = tile_numel
        self.small = space.always_in_ram(specs, fmt)

    def plan(self) -> Plan:
        if self.may_pin or not self.has_nvme:
            everything = self._all_in_ram()
            if everything is not None:
                return everything
        if not self.has_nvme:
            raise self._refusal(
                self._ram_only(extra_lo=False).slab_nbytes, "tiers.nvme.paths is not set"
            )
        plan = self._smallest()
        if round_up(plan.slab_nbytes, HUGE_PAGE_NBYTES) > self.budget:
            raise self._refusal(plan.slab_nbytes, "with one slot per size class and nothing pinned")
        plan = self._grow_slots(plan)
        return self._pin(plan) if self.may_pin else plan

    def _refusal(self, nbytes: int, case: str) -> BudgetError:
        needed = round_up(nbytes, HUGE_PAGE_NBYTES) + round_up(self.beside_nbytes, 1 << 20)
        plan = self._smallest() if self.has_nvme else self._ram_only(extra_lo=False)
        beside = [("beside the slab", self.beside_nbytes)] if self.beside_nbytes else []
        rows = "; ".join(f"{name} {short_nbytes(n)}" for name, n in [*plan.terms(), *beside])
        other = "" if self.has_nvme else ", or name a drive in tiers.nvme.paths"
        return BudgetError(
            f"tiers.cpu.budget of {format_nbytes(self.policy.tiers.cpu.budget)} is too small: "
            f"{case} the model needs "
            f"{short_nbytes(needed)} ({rows}). Set tiers.cpu.budget to at least "
            f"{-(-needed >> 20)}MiB{other}."
        )

    def _base(self, **changes: object) -> Plan:
        nvme = self.policy.tiers.nvme
        plan = Plan(
            specs=self.specs,
            fmt=self.fmt,
            pools=(),
            pinned=frozenset(),
            grads_resident=False,
            eager=self.policy.optimizer.update == "eager",
            tile_numel=self.tile_numel,
            tile_nbytes=round_up(tile_buffer_nbytes(self.tile_numel), NUMEL_MULTIPLE),
            cpu_budget_nbytes=self.policy.tiers.cpu.budget,
            uses_nvme=self.has_nvme,
            weights=self.weights,
            checksum_nbytes=self._checksum_nbytes(),
            packs=nvme is not None and nvme.packs and not self.fmt.is_stepped_in_torch,
            commit_every=self.policy.commit_every,
            rated_nbytes=nvme.rated_nbytes if nvme is not None else (),
            max_writes_per_day=nvme.max_writes_per_day if nvme is not None else None,
        )
        return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]

    def _checksum_nbytes(self) -> int:
        """Small enough that every tile of every plane is whole blocks, and else CHECKSUM_NBYTES."""
        nvme = self.policy.tiers.nvme
        if nvme is None or not nvme.checksum:
            return 0
        planes = self.fmt.state_planes + self.fmt.grad_planes
        return math.gcd(CHECKSUM_NBYTES, *(self.fmt.nbytes(p, self.tile_numel) for p in planes))

    # Everything in RAM: no file is ever opened.

    def _all_in_ram(self) -> Plan | None:
        # Without low halves gradients cannot accumulate; with a drive another plan lets them.
        for extra_lo in (True,) if self.has_nvme else (True, False):
            plan = self._ram_only(extra_lo=extra_lo)
            if round_up(plan.slab_nbytes, HUGE_PAGE_NBYTES) <= self.budget:
                return plan
        return None

    def _ram_only(self, *, extra_lo: bool) -> Plan:
        pinned = frozenset((s.index, p) for s in self.specs for p in s.state_planes(self.fmt))
        per_chunk = len(self.fmt.grad_planes) if extra_lo else 1
        bounce = 0 if self.host_compute else 1
        pools = tuple(
            self._pool(members, weight=0, grad=per_chunk * self._num_trainable(members) + bounce)
            for members in space.size_classes(self.specs)
        )
        return self._base(pools=pools, pinned=pinned, grads_resident=True, uses_nvme=False)

    # NVMe: the fewest slots first, then more slots, then pinned planes.

    def _smallest(self) -> Plan:
        cpu = self.policy.tiers.cpu
        pools = []
        for members in space.size_classes(self.specs):
            has_weights = any((i, Plane.WEIGHT) not in self.small for i in members)
            weight = (cpu.weight_slots or 1) if has_weights else 0
            grad = self._grad_slots(cpu.grad_slots or 1) if self._num_trainable(members) else 0
            pools.append(self._pool(members, weight=weight, grad=grad))
        return self._base(pools=tuple(pools), pinned=self.small)

    def _grad_slots(self, num_gradients: int) -> int:
        """Slots for so many landing gradients: one of them accumulating in two halves, and a bounce
        buffer where gradients come from another device."""
        bounce = 0 if self.host_compute else 1
        return num_gradients - 1 + len(self.fmt.grad_planes) + bounce

    def _grow_slots(self, plan: Plan) -> Plan:
        cpu = self.policy.tiers.cpu
        for which, target, fixed in (
            ("num_weight_slots", WEIGHT_SLOTS_TARGET, cpu.weight_slots),
            ("num_grad_slots", GRAD_SLOTS_TARGET, cpu.grad_slots),
        ):
            if fixed is not None:
                continue
            for position in range(len(plan.pools)):
                plan = self._grow_pool(plan, position, which, target)
        return plan

    def _grow_pool(self, plan: Plan, position: int, which: str, target: int) -> Plan:
        while True:
            pool = plan.pools[position]
            limit = min(target, len(pool.members))
            count = getattr(pool, which)
            if count == 0 or count >= limit:
                return plan
            pools = list(plan.pools)
            pools[position] = dataclasses.replace(pool, **{which: count + 1})
            larger = dataclasses.replace(plan, pools=tuple(pools))
            if round_up(larger.slab_nbytes, HUGE_PAGE_NBYTES) > self.budget:
                return plan
            plan = larger

    def _pin(self, plan: Plan) -> Plan:
        """Pin planes while they fit, those first that save the most traffic for their bytes."""
        left = self.budget - HUGE_PAGE_NBYTES - plan.slab_nbytes
        pinned = set(plan.pinned)
        pairs = [(s, p) for p in self.fmt.state_planes for s in self.specs]
        saves = {(s.index, p): space.saving(plan.pool_of(s.index), s, p) for s, p in pairs}
        pairs.sort(key=lambda pair: -saves[pair[0].index, pair[1]])
        for spec, plane in pairs:
            key, nbytes = (spec.index, plane), spec.nbytes(plane, self.fmt)
            if key not in pinned and nbytes <= left and saves[key]:
                pinned.add(key)
                left -= nbytes
        return dataclasses.replace(plan, pinned=frozenset(pinned))

    def _fit_gpu_slots(self) -> int:
        """Weight slots per size class on the device: the target, or fewer to fit its budget."""
        if self.host_compute:
            return 0
        sizes = [
            (max(self.specs[i].nbytes(Plane.WEIGHT, self.fmt) for i in members), len(members))
            for members in space.size_classes(self.specs)
        ]
        budget = self.policy.tiers.gpu.budget
        for count in range(WEIGHT_SLOTS_TARGET, 0, -1):
            needed = sum(nbytes * min(count, members) for nbytes, members in sizes)
            if budget is None or needed <= budget:
                return count
        raise BudgetError(
            f"tiers.gpu.budget of {format_nbytes(budget or 0)} is too small: one weight slot per "
            f"size class needs {format_nbytes(needed)}. Set tiers.gpu.budget to at least "
            f"{-(-needed >> 20)}MiB."
        )

    def _num_trainable(self, members: Sequence[int]) -> int:
        return sum(self.specs[i].trainable for i in members)

    def _pool(self, members: tuple[int, ...], *, weight: int, grad: int) -> PoolSpec:
        nbytes = max(self.specs[i].nbytes(Plane.WEIGHT, self.fmt) for i in members)
        return PoolSpec(
            name=self.specs[members[0]].name
            if len(members) == 1
            else f"{len(members)}x{format_nbytes(nbytes)}",
            slot_nbytes=nbytes,
            members=members,
            num_weight_slots=weight,
            num_grad_slots=grad,
            num_gpu_slots=min(self.num_gpu_slots, len(members)),
        )
