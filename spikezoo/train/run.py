"""One training run: everything that is built once, and the loop over it."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import (
    ModelEmaV3,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    init_distributed_device,
    random_seed,
)
from torch import Tensor, nn
from tqdm import tqdm

from spikezoo.data import Batch, Loader
from spikezoo.evaluate import evaluate
from spikezoo.factory import SpikingModel
from spikezoo.flags import choose_device
from spikezoo.hub import check_push
from spikezoo.observe import WithRates
from spikezoo.precision import fast_bfloat16
from spikezoo.saving import describe
from spikezoo.train import output, state
from spikezoo.train.build import Batches, build_model, build_teacher
from spikezoo.train.flags import seconds
from spikezoo.train.length import Length, Part, check_sizes
from spikezoo.train.lock import release
from spikezoo.train.logs import open_logs
from spikezoo.train.muon import FixedNormMuon, normalised_weights
from spikezoo.train.objective import Objective
from spikezoo.train.stopping import OutOfTime, Stopped, find_peers, listening, lost_peers, wanted
from spikezoo.train.sync import SyncedNorms
from spikezoo.train.teacher import TeacherCache
from spikezoo.transforms import TRANSFORMS, Transform

__all__ = ["Run", "not_finite"]

# Logits and the firing rates of every layer and time step, of a batch of images.
Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def not_finite(model: nn.Module, images: Tensor, autocast: Callable[[], Any]) -> str:
    """Name of the first layer whose output is not finite, found by running the batch again."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad(), autocast():
            if not torch.isfinite(images).all():
                return "the input images"
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "none of the layers: the loss itself"


class Run:
    """One training run; the hooks of transforms see it as :class:`spikezoo.transforms.Training`.

    Args:
        args: Parsed flags.
        deadline: When to save and raise :class:`OutOfTime`, by ``time.monotonic()``; of one process only.
    """

    def __init__(self, args: argparse.Namespace, deadline: float = math.inf) -> None:
        self.args, self.deadline, self.seed = args, deadline, args.seed
        args.device = str(choose_device(args.device))
        self.device = init_distributed_device(args)
        self.main = args.rank == 0
        if self.main and args.push_to_hub:
            check_push(args.push_to_hub)  # or the training would be over before somebody hears of a wrong token
        self.asked = 0  # the signal that asked this process to stop
        self.peers = find_peers(self)
        random_seed(args.seed, 0)  # the same initial weights on every rank
        self.model = model = build_model(args, self.device)
        # What was made, with what a checkpoint brought along: it must be made the same way by whoever loads it.
        facts = describe(model)
        args.model, self.arguments, self.recipe = facts["architecture"], facts["model_args"], facts["recipe"]
        random_seed(args.seed, args.rank)

        self.batches = Batches(args, model, self.device)
        self.train_loader, self.val_loader = self.batches.train, self.batches.val
        self.inputs, self.val_split = self.batches.inputs, self.batches.val_split
        if args.progressive is not None:
            check_sizes(args.model, model, args.progressive)
        self.objective = Objective(args, bool(args.mixup or args.cutmix))
        self._choose_precision()
        self.cache: TeacherCache | None = None
        self.teacher = self._make_teacher() if args.teacher else None
        if args.initial_checkpoint:
            self.batches.preserve_function(model)
        # Of Muon, the classifier's weights go to the optimiser for vectors. Others keep the groups that they had.
        hybrid: dict[str, Any] = {"fallback_list": ["head.*"]} if "muon" in args.opt.lower() else {}
        try:
            self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **hybrid)
        except TypeError as error:  # of an argument that the optimiser does not have
            raise ValueError(f"--opt {args.opt} --opt-kwargs {args.opt_kwargs}: {error}.") from error
        if isinstance(self.optimizer, FixedNormMuon):
            self.optimizer.fix_norms(normalised_weights(model))
        updates_per_epoch = math.ceil(len(self.train_loader) / args.grad_accum_steps)
        self.length = Length(args, self.optimizer, updates_per_epoch)
        half = args.amp_dtype == "float16"
        self.scaler = NativeScaler(self.device.type) if self.amp and half else None
        self.averaged = (
            ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        )
        self.epoch, self.batch, self.updates = 0, 0, 0
        self.sums = {"loss": 0.0, "rate": 0.0, "batches": 0, "images": 0, "seconds": 0.0, "hits": 0, "lr": 0.0}
        # What recorded transforms do in a run, with their arguments.
        self.parts: list[tuple[Transform, dict[str, Any]]] = [
            (TRANSFORMS[name], dict(arguments)) for name, arguments in dict(self.recipe).items()
        ]
        for transform, arguments in self.parts:
            if transform.start:
                transform.start(self, arguments)
        self.rng: list[dict[str, Any]] = []  # of every rank, at the time of the last save
        self.compiled: Step | None = None
        self.facts: dict[str, Any] = {}  # for metadata.json
        self.tables: dict[str, list[dict[str, Any]]] = {}  # summary.csv and layer_rates.csv, of the process that writes
        self.folder, self.saver = state.prepare(self)
        self.logs = open_logs(args, self.folder) if self.main else []

    def _choose_precision(self) -> None:
        args = self.args
        half = torch.bfloat16 if args.amp_dtype == "bfloat16" else torch.float16
        quick = fast_bfloat16(self.device)
        self.amp = quick if args.amp == "auto" else bool(args.amp)
        if self.amp and half is torch.bfloat16 and not quick:
            self.say(
                f"Warning: bfloat16 is several times slower than float32 on this {self.device.type}. Use --amp auto."
            )
        self.autocast: Callable[[], Any] = lambda: torch.autocast(self.device.type, half) if self.amp else nullcontext()

    def _make_teacher(self) -> Callable[[Tensor], Tensor]:
        args = self.args
        teach, facts = build_teacher(args, self.model, self.inputs, self.device, lambda: self.autocast())
        if args.teacher_cache:
            if args.mixup or args.cutmix:
                raise ValueError("--teacher-cache with --mixup or --cutmix: mixed images do not come again.")
            self.cache = TeacherCache(args.teacher_cache, self.train_loader, teach, facts | {"amp": self.amp})
        return teach

    # ------------------------------------------------------------------------------- what hooks of transforms see

    @property
    def ema(self) -> SpikingModel | None:
        """The model of averaged weights, or None."""
        return cast(SpikingModel, self.averaged.module) if self.averaged else None

    @property
    def epochs(self) -> int:
        """Epochs of the run, the last one perhaps in part."""
        return self.length.epochs

    def images(self, most: int) -> Loader:
        """At most so many training images, classes balanced, without augmentation, and their labels."""
        return self.batches.plain(most)

    def say(self, text: str) -> None:
        """Print a line, of several processes only once."""
        if self.main:
            print(text, flush=True)

    def evaluate(self) -> dict[str, Any]:
        """Measure the model as it would be delivered, and under 'ema' the averaged weights."""
        measure = functools.partial(
            evaluate,
            loader=self.val_loader,
            device=self.device,
            autocast=self.autocast,
            progress=self.main and sys.stderr.isatty(),
        )
        self._at_epoch(math.inf)
        results: dict[str, Any] = measure(self.model, compiled=self.compiled)
        if self.ema:
            results["ema"] = measure(self.ema)
        return results

    def _at_epoch(self, epoch: float) -> None:
        for transform, _ in self.parts:
            if transform.at_epoch:
                transform.at_epoch(self.model, epoch)

    # -------------------------------------------------------------------------------------------------- loop

    def train(self) -> dict[str, Any]:
        """Run all epochs and return the last evaluation.

        Raises:
            OutOfTime: The deadline is over; the state is saved.
            Stopped: A signal asked for it; the state is saved.
        """
        try:
            with listening(self):
                return self._train()
        except RuntimeError as error:
            # Of a rank that is killed, the others see a connection that is closed.
            if self.args.distributed and re.search("(?i)connection|closed by peer|gloo|nccl|timed? ?out", str(error)):
                raise SystemExit(lost_peers(self, error)) from error
            raise

    def _train(self) -> dict[str, Any]:
        args, model = self.args, self.model
        output.begin(self)
        net: nn.Module = WithRates(model, steps=args.tet)
        if args.distributed:
            net = nn.parallel.DistributedDataParallel(net, [self.device] if self.device.type == "cuda" else None)
        run: Step = net
        if args.torchcompile:
            # Every size of the images has kernels of its own; general ones would be slower.
            dynamic = False if args.progressive else None
            options = model.compile_options if self.device.type == "cpu" else {}
            run = torch.compile(net, dynamic=dynamic, options=options)
        # Evaluation can share the compiled step where that is the plain forward pass.
        self.compiled = run if args.torchcompile and not args.tet and not args.distributed else None
        results: dict[str, Any] = {}
        if not self.length.sizes:
            self._measure_length(run)
        if self.cache is not None:
            for first in (True, False):  # one process computes what is missing, the others read it
                if self.main is first:
                    self.cache.fill(min(self.epochs, args.views), self.device, self.main and sys.stderr.isatty())
                if args.distributed:
                    dist.barrier()
        while self.epoch < self.epochs:
            self._train_epoch(net, run)
            self._check_finite()
            if args.distributed:
                if args.dist_bn:
                    distribute_bn(model, args.world_size, args.dist_bn == "reduce")
                if self.ema:  # that of rank 0, which is the one in the checkpoints
                    distribute_bn(self.ema, args.world_size, False)
            sums = self.sums
            lr = sums["lr"] / sums["batches"]
            train = {
                "loss": sums["loss"] / sums["batches"],
                "top1": 100 * sums["hits"] * args.world_size / sums["images"],
                "firing_rate": sums["rate"] / sums["batches"] if model.neuron_config.spiking else None,
                "images_per_second": sums["images"] / sums["seconds"],
                "seconds": sums["seconds"],
            }
            self.epoch, self.batch = self.epoch + 1, 0
            self.sums = dict.fromkeys(self.sums, 0)
            acted: dict[str, Any] = {}
            for transform, arguments in self.parts:
                if transform.after_epoch:
                    acted |= transform.after_epoch(self, arguments)
            due = self.epoch % args.val_interval == 0 or self.epoch == self.epochs or acted
            results = self.evaluate() if due else {}
            self._collect_rng()
            self._finish_epoch(train, results, acted, lr)
        return results or self.evaluate()

    def _measure_length(self, run: Step) -> None:
        """Turn the time of the run into updates: by steps of every size, of which nothing is left."""
        args = self.args
        before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), state.rng_state(self.device)))
        self.model.train()
        groups = itertools.cycle(self.train_loader)
        wanted, shares = seconds(args.train_time, "--train-time"), args.progressive or {None: 1.0}
        sizes: list[Part] = []
        for size, part in shares.items():
            _, *times = [self._time_step(run, groups, size) for _ in range(6)]  # the first may compile
            step = torch.tensor(times).median()
            if args.distributed:
                dist.all_reduce(step, dist.ReduceOp.MAX)
            sizes.append((size, max(round(part * wanted / step.item()), 1)))
        self.model.load_state_dict(before[0])
        self.optimizer.load_state_dict(before[1])
        state.set_rng_state(before[2], self.device)
        self.length.set(sizes)
        told = " ".join(f"{size}:{count}" for size, count in self.length.sizes)
        again = f"--progressive {told}" if args.progressive else f"--updates {self.length.total}"
        self.say(f"--train-time {args.train_time} is {self.length.total} updates here; to repeat it: {again}")

    def _time_step(self, run: Step, groups: Iterator[Batch], size: int | None) -> float:
        started = 0.0
        for _ in range(self.args.grad_accum_steps):
            images, target = next(groups)
            started = started or time.perf_counter()
            # Stored logits cost nothing later; any numbers stand for them here.
            stored = None if self.cache is None else images.new_zeros(len(images), self.model.num_classes)
            logits, rates, taught = self._forward(run, images.to(self.device), size, stored)
            self.objective(logits, target.to(self.device), rates, taught).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _forward(
        self, run: Step, images: Tensor, size: int | None, taught: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, firing rates and the teacher's logits of a batch at a size; given ones were stored before."""
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            if self.model.encoding != "direct":  # a weighted mean may round to above 1, where no code is
                images = images.clamp(0, 1)
        synced = SyncedNorms() if self.args.sync_bn and self.args.distributed else nullcontext()
        with self.autocast(), synced:
            logits, rates = run(images)
        if taught is None and self.teacher:
            taught = self.teacher(images)
        return logits, rates, taught

    def _check_finite(self) -> None:
        # A neuron turns nan into silence, so a network with broken weights may still have a finite loss.
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                self._stop(f"{name} is not finite", self.batch, name.rpartition(".")[0])

    def _collect_rng(self) -> None:
        own = state.rng_state(self.device)
        self.rng = [own] * self.args.world_size
        if self.args.distributed:
            dist.all_gather_object(self.rng, own)

    def _train_epoch(self, net: nn.Module, run: Step) -> None:
        net.train()
        self.train_loader.set_epoch(self.epoch)
        self._at_epoch(self.epoch)
        total = len(self.train_loader)
        accumulate = self.args.grad_accum_steps
        bar = tqdm(
            total=total,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            disable=not (self.main and sys.stderr.isatty()),
            leave=False,
        )
        shown, since = time.perf_counter(), 0
        last = shown
        for images, target in self.train_loader.iterate(self.batch):
            update = (self.batch + 1) % accumulate == 0 or self.batch + 1 == total
            rate = self._compute(net, run, images.to(self.device), target.to(self.device), update)
            self.batch += 1
            since += len(images) * self.args.world_size
            if update:
                self._update()
            bar.update()
            now = time.perf_counter()
            self.sums["seconds"] += now - last
            last = now
            if self.main and (self.batch % self.args.log_interval == 0 or self.batch == total):
                line = f"loss {self.sums['loss'] / self.sums['batches']:.4f}, {since / (now - shown):.0f} images/s"
                if rate is not None:
                    line += f", firing rate {rate:.3f}"
                bar.set_postfix_str(line)
                if bar.disable:
                    self.say(f"epoch {self.epoch + 1}/{self.epochs} batch {self.batch}/{total}: {line}")
                shown, since = now, 0
            if update:
                self._save_if_due(total)
            if self.updates >= self.length.total:
                break  # a length in updates may end within an epoch
        bar.close()

    def _compute(self, net: nn.Module, run: Step, images: Tensor, target: Tensor, update: bool) -> float | None:
        """Forward and backward pass of a batch; returns the mean firing rate."""
        args, total, accumulate = self.args, len(self.train_loader), self.args.grad_accum_steps
        last_group = total - (total % accumulate or accumulate)  # a shorter last group is averaged over its own length
        group = total - last_group if self.batch >= last_group else accumulate
        sync = net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) and not update else nullcontext()
        with sync:
            taught = self.cache(self.epoch, self.batch) if self.cache else None
            logits, rates, taught = self._forward(run, images, self.length.size_at(self.updates), taught)
            loss = self.objective(logits, target, rates, taught)
            value = loss.item()
            if not math.isfinite(value):
                layer = not_finite(self.model, images, self.autocast)
                self._stop(f"the loss is {value}", self.batch + 1, layer)
            rate = rates.mean().item() if self.model.neuron_config.spiking else None
            self.sums["loss"] += value
            self.sums["rate"] += rate or 0.0
            self.sums["batches"] += 1
            self.sums["images"] += len(images) * args.world_size
            self.sums["lr"] += self.optimizer.param_groups[0]["lr"]
            shown = logits.detach().mean(0) if args.tet else logits.detach()
            wanted_class = target.argmax(1) if target.dim() > 1 else target
            self.sums["hits"] += int((shown.argmax(1) == wanted_class).sum())
            loss = loss / group
            if self.scaler:
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=self.model.parameters(),
                    need_update=update,
                )
            else:
                loss.backward()
        return rate

    def _update(self) -> None:
        if not self.scaler:
            if self.args.clip_grad is not None:
                dispatch_clip_grad(self.model.parameters(), self.args.clip_grad, self.args.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.averaged:
            self.averaged.update(self.model, step=self.updates)
        if self.length.scheduler:
            self.length.scheduler.step_update(self.updates)

    def _save_if_due(self, total: int) -> None:
        interval = self.args.recovery_interval
        over = time.monotonic() >= self.deadline
        asked = wanted(self)
        if over or asked or (interval and self.batch < total and self.batch % interval == 0):
            self._check_finite()
            self._collect_rng()
            if self.saver:
                self.saver.save_recovery(self.epoch, self.batch)
            at = f"epoch {self.epoch + 1} of {self.epochs}, batch {self.batch} of {total}"
            if asked:
                raise Stopped(asked, f"at {at}: saved in {self.folder}. To go on: the same command with --resume auto.")
            if over:
                raise OutOfTime(at)

    def _stop(self, what: str, batch: int, layer: str) -> NoReturn:
        good = state.newest_state(self.folder)
        raise SystemExit(
            f"Stopped: {what} at epoch {self.epoch + 1}, batch {batch} (update {self.updates}). "
            f"First layer whose output is not finite: {layer}. "
            f"Last good checkpoint: {good or 'none was written yet'}. "
            "A smaller --lr, --clip-grad 1.0 or a longer --warmup-epochs often helps."
        )

    def _finish_epoch(self, train: dict[str, Any], results: dict[str, Any], acted: dict[str, Any], lr: float) -> None:
        metric = results.get("ema", results).get(self.args.eval_metric)
        if self.length.scheduler:
            self.length.scheduler.step(self.epoch, metric)
        if not self.saver:
            return
        output.write_epoch(self, train, results, acted, lr)
        if results:
            self.saver.save_checkpoint(self.epoch - 1, metric)
            self.saver.drop_recovery()
        else:  # not evaluated after this epoch
            self.saver.save_recovery(self.epoch, 0)
        output.say_epoch(self, train, results)
        output.look_at_rates(self, results)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the weights that the run delivers, its pictures, and say where everything is.

        Args:
            results: The last evaluation.
        """
        if self.main:
            output.deliver(self, results)

    def close(self) -> None:
        """Give the folder back."""
        if self.main:
            release(self.folder)
