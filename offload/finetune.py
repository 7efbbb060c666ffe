"""The main job: fine-tune a causal language model on text, as one YAML file says."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import offload
from offload import machine
from offload.data import Batches, Corpus, Tokenizer, prepare_corpus
from offload.errors import NumericsError, PolicyError, StateError
from offload.jobconfig import (
    FinetuneConfig,
    OutputSection,
    TrainSection,
    changed_numbers,
    numbers_of,
)
from offload.loss import next_token_loss
from offload.openmp import limit_threads
from offload.policy import OffloadPolicy, OptimizerPolicy, short_nbytes
from offload.progress import Bar, JsonlLog, Reporter
from offload.runfolder import is_manifest
from offload.runs import remove
from offload.sources import ModelSource, build_on_meta, open_source, quiet_transformers, run_child
from offload.swapfile import MANIFEST_NAME
from offload.torchstate import optimizer_class

LOG_NAME = "log.jsonl"
SCRATCH_NAME = ".partial"  # holds a model until it is whole and has been loaded back
EAGER = "eager: no clipping, no accumulation, so each update starts when its gradient lands"
DEFERRED = (
    "deferred: clipping or accumulation needs all gradients first, then the next forward hides it"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a job came to. Losses are mean nats per token on the held-out text."""

    loss_before: float
    loss_after: float | None  # None where the job was interrupted
    num_steps: int
    train_seconds: float
    peak_rss_nbytes: int
    folder: Path


def run(config: FinetuneConfig, reporter: Reporter) -> Result:
    """Run a job from start to end. Blocks until done; Ctrl-C ends it after the step under way.

    Under durability a job that ended early goes on from its last commit when it is run again.
    Raises StateError where what decides its numbers has changed meanwhile.
    """
    if not holds_run(config):
        _check_output(config.output)
    limit_threads()
    with quiet_transformers():
        return _Job(config, reporter).run()


def plan_job(config: FinetuneConfig, reporter: Reporter) -> Any:
    """Return the Plan of a job. Builds the model without weights."""
    with quiet_transformers():
        source = open_source(config.model, lambda text: reporter.say("model", text))
        policy = config.policy()
        return offload.plan_for(meta_model(source, policy), policy)


def holds_run(config: FinetuneConfig) -> bool:
    """Whether there is a committed step of a job to go on from."""
    nvme = config.tiers.nvme
    return bool(config.commit_every and nvme and is_manifest(nvme.paths[0] / MANIFEST_NAME))


def _check_output(output: OutputSection) -> None:
    """Refuse to write over something before any work is done."""
    folder = output.folder
    if folder.exists() and not folder.is_dir():
        raise PolicyError(f"output.folder: {folder} is a file. Name a folder.")
    leftovers = {LOG_NAME, SCRATCH_NAME}  # of a job that ended before there was anything to keep
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found - leftovers and not output.overwrite:
        raise PolicyError(
            f"output.folder: {folder} is not empty. Name another, or add --set "
            "output.overwrite=true."
        )
    folder.mkdir(parents=True, exist_ok=True)


class _Job:
    """One run. Its methods are the steps that the user sees, in order."""

    def __init__(self, config: FinetuneConfig, reporter: Reporter) -> None:
        self.config = config
        self.train = config.train
        self.policy = config.policy()
        self.reporter = reporter

    def run(self) -> Result:
        torch.manual_seed(self.train.seed)
        source = open_source(self.config.model, lambda text: self.reporter.say("model", text))
        corpus = self._prepare_text(source)
        folder = self.config.output.folder
        scratch = folder / SCRATCH_NAME
        baseline_nbytes = machine.rss()
        resumes = holds_run(self.config)
        with (
            start_engine(source, self.policy, resumes=resumes) as engine,
            JsonlLog(folder / LOG_NAME, appends=resumes) as log,
        ):
            self._say_setup(source, engine)
            self._say_resumed(engine)
            log.write("start", config=self.config.model_dump(mode="json"), plan=str(engine.plan))
            result = self._train_and_compare(engine, source, corpus, log)
            shutil.rmtree(scratch, ignore_errors=True)
            engine.export(scratch)
            source.tokenizer.save_pretrained(scratch)
            self._say_memory(engine, baseline_nbytes)
            engine.close(give_back=False)  # the export has the weights
        self.reporter.say("reloaded", f"by transformers: {run_child('check', scratch)}")
        replace_model(folder, scratch)
        self.reporter.say("saved", f"the trained model is in {folder}")
        self._end_run(result)
        return result

    def _say_resumed(self, engine: Any) -> None:
        """Say from where a run goes on; refuse where it would go on to other numbers."""
        if engine.recovered is None:
            return
        changes = changed_numbers(engine.recovered.progress.get("numbers", {}), self.config)
        where = self.policy.tiers.nvme.paths[0] if self.policy.tiers.nvme else ""
        if changes:
            raise StateError(
                f"the run in {where} cannot go on: {'; '.join(changes)}. Put that back, or remove "
                f"the run with `offload clean --remove --committed {where}` to begin anew."
            )
        self.reporter.say(
            "resumed",
            f"from step {engine.recovered.step} of {self.train.steps}, committed in {where}",
        )

    def _end_run(self, result: Result) -> None:
        """Give back the space of a run whose result is safe; keep one that was interrupted."""
        if not self.policy.commit_every or self.policy.tiers.nvme is None:
            return
        if result.loss_after is None:
            self.reporter.say("kept", "the run: start it again to go on from here")
            return
        remove(self.policy.tiers.nvme.paths, committed=True)

    def _prepare_text(self, source: ModelSource) -> Corpus:
        """Tokenise, or find it done."""
        data = self.config.data
        with contextlib.ExitStack() as stack:
            bars: list[Bar] = []

            def show(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(self.reporter.bar("tokenising", total)))
                bars[0].update(done)

            corpus = prepare_corpus(data, source.tokenizer, source.tokenizer_identity, show)
        self.reporter.say(
            "text",
            f"{corpus.num_files} files, {corpus.train.num_tokens:,} tokens to train on, the last "
            f"{data.validation_fraction:.0%} of each file held out "
            f"({corpus.validation.num_tokens:,} "
            f"tokens){', tokenised earlier' if corpus.was_cached else ''}",
        )
        return corpus

    def _say_setup(self, source: ModelSource, engine: Any) -> None:
        self.reporter.say("model", source.label)
        self.reporter.say("plan", str(engine.plan))
        if self.config.optimizer.update == "auto":
            self.reporter.say("updates", EAGER if self.config.steps_alone else DEFERRED)

    def _train_and_compare(
        self, engine: Any, source: ModelSource, corpus: Corpus, log: JsonlLog
    ) -> Result:
        size, length = self.train.batch_size, self.config.data.sequence_length
        held_out = Batches(corpus.validation, length, size, self.train.seed)
        batches = Batches(corpus.train, length, size, self.train.seed)
        before = engine.run.progress.get("loss_before")
        if before is None:
            before = self._validate("before", engine, held_out, log)
            self._sample("before", engine, source.tokenizer)
        engine.run.progress = {"numbers": numbers_of(self.config), "loss_before": before}
        start = time.perf_counter()
        num_steps = self._train(engine, batches, log)
        train_seconds = time.perf_counter() - start
        after = None
        if num_steps == self.train.steps:
            after = self._validate("after", engine, held_out, log)
            self._sample("after", engine, source.tokenizer)
            self.reporter.say(
                "result", f"validation loss {before:.3f} -> {after:.3f} in {train_seconds:.0f} s"
            )
        return Result(
            loss_before=before,
            loss_after=after,
            num_steps=num_steps,
            train_seconds=train_seconds,
            peak_rss_nbytes=machine.peak_rss(),
            folder=self.config.output.folder,
        )

    def _validate(self, when: str, engine: Any, held_out: Batches, log: JsonlLog) -> float:
        """Mean loss over the same held-out windows every time."""
        batches = list(held_out.spread(self.train.eval_batches))
        total = 0.0
        with self.reporter.bar("validating", len(batches)) as bar, _evaluating(engine.model):
            for done, batch in enumerate(batches, 1):
                total += float(_loss(engine.model, batch)) * len(batch)
                bar.update(done)
        loss = total / sum(len(batch) for batch in batches)
        self.reporter.say("validation", f"loss {loss:.4f} {when} training ({len(batches)} batches)")
        log.write("validation", when=when, loss=loss)
        return loss

    def _sample(self, when: str, engine: Any, tokenizer: Tokenizer) -> None:
        """Print what the model makes of the prompt, greedily."""
        output = self.config.output
        if output.sample_tokens:
            text = printable(sample(engine.model, tokenizer, output.prompt, output.sample_tokens))
            self.reporter.say(f"sample {when}", f"{output.prompt}▸{text}")

    def _train(self, engine: Any, batches: Batches, log: JsonlLog) -> int:
        """Train and return how many steps were done: all, or those up to Ctrl-C."""
        train = self.train
        optimizer = make_optimizer(engine.model, train, self.config.optimizer)
        first = engine.run.num_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: rate_share(first + i, train)
        )
        engine.model.train()
        hurry = engine.run.wear.hurry
        with self.reporter.bar("training", train.steps) as bar, _stop_on_interrupt(hurry) as stop:
            for step in range(first + 1, train.steps + 1):
                start = time.perf_counter()
                loss = self._step(engine, optimizer, batches, step)
                scheduler.step()
                seconds = time.perf_counter() - start
                stats = engine.stats()
                tokens = train.batch_size * train.accumulation * batches.sequence_length
                shares = stats.shares()
                wear = engine.run.wear.report().short()
                note = f"loss {loss:.3f}  {tokens / seconds:.0f} tokens/s  {_where(shares)}"
                bar.update(step, f"{note} | {wear}" if wear else note)
                log.write(
                    "step",
                    step=step,
                    loss=loss,
                    step_seconds=seconds,
                    tokens_per_s=tokens / seconds,
                    shares=shares,
                    nbytes=stats.nbytes,
                    written_by_drive=stats.written_by_drive,
                )
                if stop.is_requested:
                    self.reporter.say("stopped", f"after step {step} of {train.steps}, as asked")
                    return step
        self._say_traffic(engine.stats().nbytes)
        self.reporter.say("wear", str(engine.run.wear.report()))
        return train.steps

    def _step(self, engine: Any, optimizer: Any, batches: Batches, step: int) -> float:
        """One optimizer step; returns its mean loss. Raises NumericsError before a bad update."""
        num = self.train.accumulation
        total = 0.0
        for part in range(num):
            loss = _loss(engine.model, batches.batch((step - 1) * num + part)) / num
            total += loss.item()
            if not math.isfinite(total):
                raise NumericsError(
                    f"the loss of step {step} is {total}; the weights are as step {step - 1} "
                    "left them. "
                    "Lower train.lr, set train.clip, or look at the text."
                )
            torch.autograd.backward(loss)
        if self.train.clip is not None:
            engine.clip_grad_norm_(engine.model.parameters(), self.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def _say_traffic(self, nbytes: Mapping[str, int]) -> None:
        moved = ", ".join(
            f"{name} {short_nbytes(count)}" for name, count in nbytes.items() if count
        )
        self.reporter.say("traffic", f"of the last step: {moved or 'none, all in memory'}")

    def _say_memory(self, engine: Any, baseline_nbytes: int) -> None:
        memory = engine.memory()
        self.reporter.say("memory", str(memory))
        peak, slab = memory.peak_rss_nbytes, memory.slab_nbytes
        self.reporter.say(
            "resident",
            f"{short_nbytes(peak)} at most: {short_nbytes(baseline_nbytes)} Python, libraries and "
            f"tokenizer, {short_nbytes(slab)} slab, {short_nbytes(peak - baseline_nbytes - slab)} "
            "activations, logits and the rest",
        )


def replace_model(folder: Path, scratch: Path) -> None:
    """Move a finished model from `scratch` into `folder`, in place of the weights there."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()  # a model of fewer shards would leave some of them behind
    for new in scratch.iterdir():
        new.replace(folder / new.name)
    scratch.rmdir()


def start_engine(source: ModelSource, policy: OffloadPolicy, *, resumes: bool) -> Any:
    """Put a model on the tiers without ever having it whole in memory, or find it there with
    `resumes`. Returns its engine.
    """
    if resumes:
        return offload.offload(meta_model(source, policy), policy, weights="resume")
    if source.folder is not None:
        return offload.load_pretrained(source.folder, policy)
    return offload.offload(meta_model(source, policy), policy, weights="init")


def meta_model(source: ModelSource, policy: OffloadPolicy) -> torch.nn.Module:
    """The model of a source without weights, in the dtype that the state format computes in."""
    dtype = torch.float32 if policy.state.format == "fp32" else torch.bfloat16
    model: torch.nn.Module = build_on_meta(source.config, dtype)
    return model


def make_optimizer(model: torch.nn.Module, train: TrainSection, policy: OptimizerPolicy) -> Any:
    """The optimizer with weight decay on matrices only; of SGD, the first beta is its momentum. One
    of torch takes its other arguments from optimizer.options.
    """
    kind = policy.kind
    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "torch":
        return offload.Torch(
            optimizer_class(str(policy.name)), groups, **{"lr": train.lr, **policy.options}
        )
    if kind == "sgd":
        return offload.SGD(groups, lr=train.lr, momentum=train.betas[0])
    if kind == "adafactor":
        return offload.Adafactor(groups, lr=train.lr, beta1=train.betas[0])
    if kind == "scale":
        return offload.SCALE(groups, lr=train.lr, betas=train.betas, **policy.options)
    make = offload.Lion if kind == "lion" else offload.AdamW
    return make(groups, lr=train.lr, betas=train.betas)


def rate_share(index: int, train: TrainSection) -> float:
    """The share of train.lr that step `index`, counted from 0, trains with."""
    if index < train.warmup:
        return (index + 1) / (train.warmup + 1)
    left = 1.0 - (index - train.warmup) / max(1, train.steps - train.warmup)
    shares = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return max(0.0, shares[train.schedule])


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, num_tokens: int) -> str:
    """Continue `prompt` greedily, by at most `num_tokens`. Runs the whole text at every token.

    The text is padded to its final length: what follows does not change what a causal model says
    here, and oneDNN keeps compiled kernels for every length that it sees (160 MiB in 50 tokens).
    """
    given = tokenizer.encode(prompt, add_special_tokens=False)
    end = len(given)
    ids = torch.tensor([given + [0] * num_tokens], device=_input_device(model))
    with _evaluating(model):
        while end < ids.shape[1]:
            chosen = model(input_ids=ids, use_cache=False).logits[0, end - 1].argmax()
            if chosen == tokenizer.eos_token_id:
                break
            ids[0, end] = chosen
            end += 1
    return tokenizer.decode(ids[0, len(given) : end].tolist(), skip_special_tokens=True)


def _loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss per token of int64 [batch, length]; every token but the first is predicted."""
    batch = batch.to(_input_device(model))
    return next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)


def _input_device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclasses.dataclass(slots=True)
class _Stop:
    is_requested: bool = False


@contextlib.contextmanager
def _stop_on_interrupt(hurry: Callable[[], None]) -> Iterator[_Stop]:
    """Make the first Ctrl-C a request to stop after the step, and `hurry` to its end; the second
    interrupts at once.
    """
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_requested:
            raise KeyboardInterrupt
        stop.is_requested = True
        hurry()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Show what a terminal would obey or hide, such as escape codes, as replacement characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _where(shares: Mapping[str, float]) -> str:
    """Where the time went, such as `compute 81 % | nvme read 11 %`, without what rounds to 0."""
    shown = [f"{name} {share * 100:.0f} %" for name, share in shares.items() if share >= 0.005]
    return " | ".join(shown)
