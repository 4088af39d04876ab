"""Training, with or without a teacher: runs that go on where they stopped, bit for bit.

What a step sees and draws depends on the seed, the epoch and the step alone: the images' order and
augmentation (`augment`), Mixup, dropout and stochastic depth. So a checkpoint needs no state of any
generator, and the number of workers changes nothing.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deit_fast.batch_inference import digest
from deit_fast.engine import data_config
from deit_fast.pretrained import save_pretrained

from . import augment, checkpoints, evaluate, folder
from .processes import Group, Interrupted, signals
from .recipe import Recipe
from .store import read
from .store.files import Store, Unwritten
from .store.pictures import require_readable
from .student import AMP, Settings, arguments, parameter_groups, student
from .teacher import Objective, load_teacher

POLL = 10  # updates between looks at what would make a GPU wait: the loss, other processes' signals


def train(
    settings: Settings,
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int = 0,
    save_every: int = 1000,
    eval_every: int = 1,
    restart: bool = False,
    tensorboard: bool = False,
    report: Callable[[dict], None] = lambda event: None,
) -> dict:
    """Train into the folder `out`; the same call again goes on from its checkpoint.

    out: gets settings.json, checkpoint.pt (after each epoch and each `save_every` updates),
    log.csv (an epoch a row), unreadable.csv, run.json, result.json, and the models of the last
    epoch, model/ and with the recipe's `ema` model-ema/, for `deit_fast.from_pretrained`. report:
    gets a dict with "event": "begin", "update", "epoch" or "note", in the first process alone.
    Under torchrun each of its processes makes this call.

    Returns the content of result.json. Raises ValueError or FileNotFoundError for arguments and
    files that do not fit, and where `out` holds a run with other settings (unless `restart`, which
    throws that away); FloatingPointError for a loss or weights that are not finite, when the
    last good checkpoint is kept; `Interrupted` after SIGTERM or SIGINT, with everything that was
    trained saved; OSError where something can't be written.
    """
    for name, value, least in (("workers", workers, 0), ("save_every", save_every, 1),
                               ("eval_every", eval_every, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: {value}, expected {least} or more")
    if tensorboard:
        folder.summary_writer()  # or an error before anything else
    out = Path(out)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(Group.joined())
        if group.leads:
            stack.enter_context(folder.locked(out))
        came = stack.enter_context(signals())
        run = Run(settings, recipe, out, group, workers, came, report)
        run.begin(restart)
        log = None
        if tensorboard and group.leads:
            log = stack.enter_context(folder.tensorboard(out, run.epoch + 1))
        try:
            return run.go(save_every, eval_every, log)
        except RuntimeError as error:  # a worker that the signal found before it had begun
            if came and not isinstance(error, Interrupted):
                raise Interrupted(came[0], run.saved) from error
            raise


class Run:
    """One process's part of a run."""

    def __init__(self, settings, recipe, out, group, workers, signals, report):
        self.store = None if settings.store is None else Store(settings.store)
        if self.store is not None:
            settings = read.adopt(self.store, settings)
        self.settings, self.recipe, self.out, self.group = settings, recipe, out, group
        self.workers, self.signals = workers, signals
        self.report = report if group.leads else lambda event: None
        self.device = group.device
        self.images, self.validation, self.model = student(settings, recipe)
        self.model_args = arguments(settings, self.model)
        config = data_config(self.model)
        self.img_size = config["input_size"][1]
        mixing = "the store's pairs" if self.store else "Mixup" if recipe.mixes else None
        self.per_step = _split(recipe.batch, group.world, settings.accum, mixing)

        self.model.to(self.device)
        self.teacher = None
        if settings.teacher is not None:
            self.teacher = load_teacher(
                settings.teacher, len(self.images.classes), self.img_size,
                settings.teacher_checkpoint, settings.backend, settings.teacher_checkpoint_key,
            ).to(self.device)  # fmt: skip
        self.token = None
        if settings.distill != "none" or self.store is not None:
            both = hasattr(self.model, "set_distilled_training")
            self.token = "class"
            if both:
                self.token = "distill" if self.store is None else "both"
                self.model.set_distilled_training(True)
        self.notes, self.mixup = [], None
        self.stored = None  # epochs of the store, one for each of this run
        if self.store is None:
            self._from_images(config)
        else:
            self._from_store(config)
        self.updates = len(self.batches)

        self.optimizer = create_optimizer_v2(
            self.model, recipe.opt, lr=recipe.peak_lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum, param_group_fn=partial(parameter_groups, recipe),
            **({"eps": recipe.opt_eps} if "adam" in recipe.opt else {}),
        )  # fmt: skip
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, "cosine", recipe.epochs, min_lr=recipe.min_lr,
            warmup_epochs=recipe.warmup_epochs, warmup_lr=recipe.warmup_lr,
            step_on_epochs=not recipe.sched_on_updates, updates_per_epoch=self.updates,
        )  # fmt: skip
        self.ema = ModelEmaV3(self.model, recipe.ema) if recipe.ema else None
        fp16 = settings.amp == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.parallel = self.model
        if group.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, [self.device.index] if self.device.type == "cuda" else None
            )
        if settings.compile:
            self.model.compile(mode=settings.compile)

        self.epoch = self.update = 0  # where the next update is
        self.rows, self.unreadable, self.teacher_top1 = [], {}, None
        self._identity = self._identify()
        self.saved = "the beginning"
        self._new_epoch()

    # What it learns from

    def _from_images(self, config):
        """Images with their labels, and the teacher if there is one."""
        recipe, group = self.recipe, self.group
        self.objective = Objective(recipe, self.settings.distill, self.teacher, self.model)
        if recipe.mixes:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.label_smoothing,
                num_classes=len(self.images.classes),
            )  # fmt: skip
        self.batches = augment.Batches(
            len(self.images), self.per_step, recipe.repeated_aug, self.settings.seed,
            group.rank, group.world,
        )  # fmt: skip
        self._require_updates(len(self.batches.sampler))
        augmented = augment.Augmented(self.images, augment.transform_of(recipe, config))
        self.loader = augment.loader(augmented, self.batches, self.workers)

    def _from_store(self, config):
        """What a teacher said of pictures that are made again; Mixup is in them."""
        group, records = self.group, self.store.manifest.records
        pictures, self.notes = read.pictures_of(self.store, self.images, self.recipe, config)
        self.objective = read.objective
        self.batches = read.Batches(
            records, [], self.per_step, self.settings.seed, group.rank, group.world
        )  # of epochs that `begin` chooses
        self._require_updates(2 * (records // 2 // group.world))
        self.loader = read.loader(read.Taught(self.store, pictures), self.batches, self.workers)

    def _choose(self, state):
        """Which epochs of the store are learnt from, one for each of this run: a checkpoint's,
        whatever happened since to those that are behind it, or the first that are as they were
        written. None is read that is not needed."""
        need = self.recipe.epochs
        if state is None:
            epochs, damages = self._verify(range(self.store.manifest.epochs), need)
            self._require_epochs(epochs, damages)
            self._learn_from(epochs)
            return
        _, damages = self._verify(self.stored[state["epoch"] :], need)
        if damages:
            raise next(iter(damages.values()))

    def _learn_from(self, epochs):
        self.stored = self.batches.epochs = epochs
        self._identity["settings"]["store"]["epochs"] = epochs

    def _verify(self, epochs, need):
        """(those that are whole, {epoch: Damaged} of others) until there are so many; all processes
        read."""
        whole, damages, group = [], {}, self.group
        for i in range(0, len(epochs), group.world):
            if len(whole) >= need:
                break
            mine = epochs[i + group.rank : i + group.rank + 1]
            for some in group.gather([(epoch, self.store.damage(epoch)) for epoch in mine]):
                whole += [epoch for epoch, damage in some if damage is None]
                damages |= {epoch: damage for epoch, damage in some if damage is not None}
        return whole[:need], damages

    def _require_epochs(self, epochs, damages):
        kinds = {"damaged": {}, "not written": {}}
        for epoch, damage in damages.items():
            kinds["not written" if isinstance(damage, Unwritten) else "damaged"][epoch] = damage
        if len(epochs) < self.recipe.epochs:
            why = "; ".join(
                f"{len(found)} {_are(found)} {kind}: {next(iter(found.values()))}"
                for kind, found in kinds.items()
                if found
            )
            raise ValueError(
                f"epochs: {self.recipe.epochs}, but {self.store.folder} has {len(epochs)} "
                f"that can be used{why and f' ({why})'}"
            )
        self.notes += [f"{damage}: this epoch is left out" for damage in kinds["damaged"].values()]
        if found := kinds["not written"]:
            named = ", ".join(map(str, found))
            self.notes.append(
                f"store: {len(found)} epoch{'s' * (len(found) > 1)} {_are(found)} not written, and "
                f"left out: {named}"
            )

    def _require_updates(self, mine):
        if not len(self.batches):
            raise ValueError(
                f"batch: {self.recipe.batch}, expected at most the {mine} images that each of "
                f"{self.group.world} processes has in an epoch"
            )

    # Beginning

    def begin(self, restart: bool) -> None:
        """From the checkpoint in `out`, or at the start."""
        path = self.out / folder.CHECKPOINT
        there = self.group.gather(path.exists() and not restart)
        if any(there) != all(there):
            raise ValueError(f"out: {path} is not there for each process, expected a shared folder")
        state = checkpoints.load(path) if there[0] else None
        if state is not None:
            was = state["identity"].get("settings", {}).get("store")
            if was and self.store is not None:
                self._learn_from(was["epochs"])
            folder.compare(path, state["identity"], self._identity)
        if self.store is not None:
            self._choose(state)
        if restart and self.group.leads:  # what this run needs is there
            folder.empty(self.out)
        if state is not None:
            self._restore(state)
        elif self.teacher is not None:
            self.teacher_top1 = self._judge(self.teacher)["top1"]["class"]
        if self.group.leads:
            parameters = sum(p.numel() for p in self.model.parameters())
            folder.write_json(self.out / folder.SETTINGS, self._identity)
            folder.write_json(self.out / folder.RUN, {
                "model": self._identity["settings"]["model"], "teacher": self._taught_by(),
                "teacher_top1": self.teacher_top1,
                "distill": self.settings.distill if self.store is None else "store",
                "distill_token": self.token, "img_size": self.img_size,
                "epochs": self.recipe.epochs, "seed": self.settings.seed, "params": parameters,
            })  # fmt: skip
            self._write_log()
        self.report({
            "event": "begin", "epoch": self.epoch, "update": self.update, "updates": self.updates,
            "epochs": self.recipe.epochs, "batch": self.recipe.batch, "images": len(self.images),
            "validation": len(self.validation), "teacher_top1": self.teacher_top1,
        })  # fmt: skip
        for text in self.notes:
            self.report({"event": "note", "text": text})

    def _taught_by(self):
        if self.store is None:
            return self.settings.teacher
        manifest = self.store.manifest
        return f"{manifest.notes['teacher']}, K = {manifest.k}"

    def _identify(self):
        """What a run must have in common with its checkpoint: names of files may change."""
        settings = dataclasses.asdict(self.settings)
        settings["model"] = self.settings.model or self.model.pretrained_cfg["architecture"]
        for name in ("data", "start_key", "teacher_checkpoint", "teacher_checkpoint_key"):
            del settings[name]
        settings["store"] = None
        if self.store is not None:
            settings["store"] = {"key": self.store.manifest.key, "epochs": self.stored}
        settings["start"] = None if self.settings.start is None else digest(self.model)
        settings["teacher"] = None if self.teacher is None else digest(self.teacher)
        labels = hashlib.blake2b(self.images.labels.tobytes(), digest_size=8).hexdigest()
        return {
            "settings": settings,
            "recipe": dataclasses.asdict(self.recipe),
            "images": {"train": len(self.images), "classes": self.images.classes, "labels": labels},
            "processes": self.group.world,
        }

    def _restore(self, state):
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.update = state["epoch"], state["update"]
        self.rows, self.unreadable = state["rows"], state["unreadable"]
        self.teacher_top1 = state["teacher_top1"]
        self._new_epoch()
        self.loss_sum += state["loss_sums"][self.group.rank]
        self.seconds, self.saved = state["seconds"], self._where()

    def _new_epoch(self):
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds = 0.0

    # Going on

    def go(self, save_every, eval_every, log) -> dict:
        """Train to the end and write what came of it. log: gets every row of log.csv."""
        alone = self.device.type == "cpu" and self.group.world == 1
        while self.epoch < self.recipe.epochs:
            self.scheduler.step(self.epoch)
            self.parallel.train()
            if self.recipe.freeze_bn:
                for module in self.model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
            self.batches.begin(self.epoch, self.update)
            began = time.perf_counter()
            for images, target, unreadable in self.loader:
                require_readable(images, unreadable)
                self._step(images, target)
                self._note(unreadable)
                self.update += 1
                saves = self.update % save_every == 0 and self.update < self.updates
                if saves or alone or self.update % POLL == 0 or self.update == self.updates:
                    mean, came = self._look()  # waits for the GPU
                    self.seconds += time.perf_counter() - began
                    self._tell(mean)
                    if saves or came:
                        self._save()
                    if came:
                        raise Interrupted(came, self.saved)
                    began = time.perf_counter()
            row = self._end_epoch(eval_every)
            if log is not None:
                log(row)
        return self._finish()

    def _step(self, images, target):
        """target: labels (B,), or from a store a pair of tensors of B rows."""
        step = (self.settings.seed, self.epoch, self.update, self.group.rank)
        seed = int(np.random.SeedSequence(step).generate_state(1)[0])
        augment.reseed(seed)
        torch.manual_seed(seed)  # the GPU's too
        if self.recipe.sched_on_updates:
            self.scheduler.step_update(self.epoch * self.updates + self.update)
        images = images.to(self.device, non_blocking=True)
        target = [target] if torch.is_tensor(target) else target
        target = [t.to(self.device, non_blocking=True) for t in target]
        if self.mixup is not None:
            images, *target = self.mixup(images, *target)
        accum = self.settings.accum
        parts = list(zip(*(t.chunk(accum) for t in (images, *target)), strict=True))
        dtype = AMP[self.settings.amp]
        for i, (x, *y) in enumerate(parts, 1):
            waits = self.group.world > 1 and i < len(parts)
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    loss = self.objective(self.parallel(x), x, *y) / accum
                self.scaler.scale(loss).backward()
            self.loss_sum += loss.detach()
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)

    def _note(self, unreadable):
        for name, reason in unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.report({"event": "note", "text": f"unreadable, left out: {name}: {reason}"})

    def _look(self):
        """The mean loss of this epoch so far, and the signal that came to any process, or 0."""
        lost, updates = self.group.sum(self.loss_sum.item(), self.update)
        mean = lost / updates if updates else 0.0
        self._require(math.isfinite(mean), f"the loss is {mean}")
        return mean, max(self.group.gather(max(self.signals, default=0)))

    def _tell(self, mean):
        self.report({
            "event": "update", "epoch": self.epoch, "update": self.update, "loss": mean,
            "lr": self._lr(), "images_per_s": self._speed(),
        })  # fmt: skip

    def _lr(self):
        """The last layer's: with layer_decay those before have less."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _speed(self):
        return self.update * self.recipe.batch / self.seconds if self.seconds else 0.0

    def _require(self, good, what):
        if not good:
            path = self.out / folder.CHECKPOINT
            kept = f"{path} is the last good checkpoint" if path.exists() else "nothing was saved"
            raise FloatingPointError(
                f"{what} at {self._where()}; {kept}. Another run may start from it with "
                "a lower lr, more warmup_epochs, clip_grad, or another amp"
            )

    def _where(self):
        return f"epoch {self.epoch + 1} of {self.recipe.epochs}, update {self.update}"

    def _end_epoch(self, eval_every):
        mean, _ = self._look()
        self._save()  # evaluation takes its time
        row = {
            "epoch": self.epoch + 1, "lr": self._lr(), "loss": mean,
            "images_per_s": self._speed(), "seconds": self.seconds,
        }  # fmt: skip
        if (self.epoch + 1) % eval_every == 0 or self.epoch + 1 == self.recipe.epochs:
            try:
                row["scores"] = self._judge(self.model)
                if self.ema is not None:
                    row["ema"] = self._judge(self.ema.module)
            except FloatingPointError as error:  # from weights that are finite, but only just
                self._require(False, str(error))
        self.rows.append(row)
        self.epoch, self.update = self.epoch + 1, 0
        self._new_epoch()
        self._save()
        if self.group.leads:
            self._write_log()
        self.report({"event": "epoch", **row})
        return row

    def _judge(self, model):
        """{"top1": {head: percent}, "top5": ...} on the validation images, all processes' together.
        The model is left in eval mode."""
        numbers = range(self.group.rank, len(self.validation), self.group.world)
        heads = evaluate.heads_of(model)
        accuracy = evaluate.Accuracy(0, dict.fromkeys(heads, 0), dict.fromkeys(heads, 0))
        if numbers or self.group.world == 1:
            found = evaluate.predictions(
                model.eval(), self.validation,
                batch_size=max(self.per_step // self.settings.accum, 1), workers=self.workers,
                dtype=AMP[self.settings.amp], numbers=numbers, progress=self._stop_if_told,
            )  # fmt: skip
            self._note(found.skipped)
            accuracy = found.accuracy()
        counts = [accuracy.images, *accuracy.top1.values(), *accuracy.top5.values()]
        images, *hits = map(int, self.group.sum(*counts))
        top1, top5 = hits[: len(heads)], hits[len(heads) :]
        total = evaluate.Accuracy(
            images, dict(zip(heads, top1, strict=True)), dict(zip(heads, top5, strict=True))
        )
        return total.percent() | {"images": images}

    def _stop_if_told(self, done):
        if self.signals:
            raise Interrupted(self.signals[0], self.saved)

    # Writing

    def _save(self):
        models = [self.model] + ([] if self.ema is None else [self.ema.module])
        good = all(p.isfinite().all() for model in models for p in model.parameters())
        self._require(good, "weights are not finite")
        states = self.group.gather((self.loss_sum.item(), self.unreadable))
        for _, unreadable in states:
            self._note(list(unreadable.items()))
        if not self.group.leads:
            self.saved = self._where()
            return
        checkpoints.save(self.out / folder.CHECKPOINT, {
            "identity": self._identity, "epoch": self.epoch, "update": self.update,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rows": self.rows, "unreadable": self.unreadable, "teacher_top1": self.teacher_top1,
            "loss_sums": [loss_sum for loss_sum, _ in states], "seconds": self.seconds,
        })  # fmt: skip
        self.saved = self._where()

    def _write_log(self):
        """log.csv and unreadable.csv, as of the checkpoint: a row is never there twice."""
        folder.write_csv(self.out / folder.LOG, [folder.flat(row) for row in self.rows])
        if self.unreadable:
            rows = [{"image": name, "reason": why} for name, why in self.unreadable.items()]
            folder.write_csv(self.out / folder.UNREADABLE, rows)

    def _finish(self):
        """Models and result.json of a run that is through; again if that was interrupted."""
        last = self.rows[-1]
        speeds = [row["images_per_s"] for row in self.rows]
        result = last["scores"] | {
            "epoch": last["epoch"], "images_per_s": float(np.median(speeds)),
            "seconds": sum(row["seconds"] for row in self.rows),
            "unreadable": len(self.unreadable),
        }  # fmt: skip
        if self.ema is not None:
            result["ema"] = last["ema"]
        if self.group.leads:
            save_pretrained(self.model, self.out / folder.MODEL, **self.model_args)
            if self.ema is not None:
                save_pretrained(self.ema.module, self.out / folder.EMA_MODEL, **self.model_args)
            folder.write_json(self.out / folder.RESULT, result)
        return result


def _are(some):
    return "is" if len(some) == 1 else "are"


def _split(batch, world, accum, mixing):
    """Images of one process in one update. mixing: what needs pairs of them, or None."""
    if batch % (world * accum):
        raise ValueError(
            f"batch: {batch}, expected a multiple of {world * accum} "
            f"({world} processes, {accum} parts each)"
        )
    mine = batch // world
    if mixing and mine % 2:
        raise ValueError(
            f"batch: {mine} images in each process, expected an even number for {mixing}"
        )
    return mine
