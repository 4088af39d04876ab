"""One rank's part of a run: beginning or resuming, updates, evaluation, log and checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deit_fast.engine import data_config
from deit_fast.pretrained import save_pretrained

from . import augment, best_epoch, checkpoints, run_folder, trained_part
from .adapters import merged
from .distributed import Ranks
from .identity import require_same_run, run_identity
from .interrupt import Interrupted
from .learner import Learner
from .recipe import Recipe
from .sources import ImageSource, StoreSource
from .store.compatibility import adopt_settings
from .store.reader import Store
from .store.views import Unreadables, require_readable
from .student import AMP, Settings, build_student, model_arguments
from .teacher import load_teacher
from .validation import validate

POLL = 10  # updates between looks at what would make a GPU wait: the loss, other ranks' signals

Report = Callable[[dict], object]


class Run:
    """One rank's part of a run, see `train.train`.

    Args:
        settings: What is trained on what.
        recipe: How.
        out: The run's folder.
        ranks: This rank and the others.
        workers: Processes that decode and augment.
        signals: Gets the numbers of signals as they come.
        report: Gets events.
    """

    def __init__(
        self, settings: Settings, recipe: Recipe, out: Path, ranks: Ranks, workers: int,
        signals: list[int], report: Report,
    ):  # fmt: skip
        trained_part.require_possible(settings, recipe)
        self.store = None if settings.store is None else Store(settings.store)
        if self.store is not None:
            settings = adopt_settings(self.store, settings)
        self.settings, self.recipe, self.out, self.ranks = settings, recipe, out, ranks
        self.workers, self.signals = workers, signals
        self.report: Report = report if ranks.is_main else lambda event: None
        self.device = ranks.device
        self.images, self.validation, self.model = build_student(settings, recipe)
        self.model_args = model_arguments(settings, self.model)
        config = data_config(self.model)
        self.img_size = config["input_size"][1]
        mixing = "the store's pairs" if self.store else "Mixup" if recipe.mixes else None
        self.per_step = _split_batch(recipe.batch, ranks.world_size, settings.accum, mixing)

        self.model.to(self.device)
        self.teacher = None
        if settings.teacher is not None:
            self.teacher = load_teacher(
                settings.teacher, len(self.images.classes), self.img_size,
                settings.teacher_checkpoint, settings.backend, settings.teacher_checkpoint_key,
            ).to(self.device)  # fmt: skip
        self.token = self._choose_token()
        self.source: ImageSource | StoreSource
        if self.store is None:
            self.source = ImageSource(
                self.images, settings, recipe, config, self.model, self.teacher, self.per_step,
                ranks, workers,
            )  # fmt: skip
        else:
            self.source = StoreSource(
                self.store, self.images, settings, recipe, config, self.per_step, ranks, workers
            )
        self.updates = len(self.source.batches)
        self.identity = run_identity(
            settings, recipe, self.images, self.store, self.model, self.teacher, ranks.world_size
        )
        self.params = sum(p.numel() for p in self.model.parameters())
        self.notes = trained_part.choose(self.model, settings, recipe)
        self.learner = Learner(self.model, settings, recipe, self.updates, ranks)

        self.epoch = self.update = 0  # where the next update is
        self.rows: list[dict] = []
        self.unreadable: dict[str, str] = {}
        self.teacher_top1: float | None = None
        self.saved = "the beginning"
        self._new_epoch()

    def _choose_token(self) -> str | None:
        """Which token learns from a teacher: "class", "distill", "both", or None without one."""
        if self.settings.distill == "none" and self.store is None:
            return None
        if not hasattr(self.model, "set_distilled_training"):
            return "class"
        self.model.set_distilled_training(True)  # type: ignore[operator]  # timm's method
        return "distill" if self.store is None else "both"

    # Beginning, and resuming from a checkpoint

    def begin(self, restart: bool) -> None:
        """Resume from the checkpoint in `out`, or begin.

        Raises:
            ValueError: The checkpoint is damaged or of another run, or only some ranks see it.
        """
        path = self.out / run_folder.CHECKPOINT
        there = self.ranks.all_gather(path.exists() and not restart)
        if any(there) != all(there):
            raise ValueError(f"out: {path} is not there for each rank, expected a shared folder")
        state = checkpoints.load(path) if there[0] else None
        if state is not None:
            was = state["identity"].get("settings", {}).get("store")
            if was and self.store is not None:
                self._learn_from(was["epochs"])
            require_same_run(path, state["identity"], self.identity)
        if isinstance(self.source, StoreSource):
            if state is None:
                self._learn_from(self.source.choose_epochs())
            else:  # its epochs, whatever happened since to those that are behind it
                self.source.require_whole(state["epoch"])
        if restart and self.ranks.is_main:  # what this run needs is there
            run_folder.empty(self.out)
        if state is not None:
            self._restore(state)
            if self.ranks.is_main:
                best_epoch.require_weights(self.out, self.rows, self.settings.best)
        elif self.teacher is not None:
            self.teacher_top1 = self._validate(self.teacher)["top1"]["class"]
        if self.ranks.is_main:
            run_folder.write_json(self.out / run_folder.SETTINGS, self.identity)
            run_folder.write_json(self.out / run_folder.RUN, self._facts())
            self._write_log()
        self.report({
            "event": "begin", "epoch": self.epoch, "update": self.update, "updates": self.updates,
            "epochs": self.recipe.epochs, "batch": self.recipe.batch, "images": len(self.images),
            "validation": len(self.validation), "teacher_top1": self.teacher_top1,
        })  # fmt: skip
        for text in [*self.source.notes, *self.notes]:
            self.report({"event": "note", "text": text})

    def _learn_from(self, epochs: list[int]) -> None:
        """Take these epochs of the store, which are part of what the run is."""
        assert isinstance(self.source, StoreSource)
        self.source.learn_from(epochs)
        self.identity["settings"]["store"]["epochs"] = epochs

    def _facts(self) -> dict:
        """The content of run.json."""
        teacher = self.settings.teacher
        if self.store is not None:
            manifest = self.store.manifest
            teacher = f"{manifest.notes['teacher']}, K = {manifest.k}"
        return {
            "model": self.identity["settings"]["model"], "teacher": teacher,
            "teacher_top1": self.teacher_top1,
            "distill": self.settings.distill if self.store is None else "store",
            "distill_token": self.token, "img_size": self.img_size, "epochs": self.recipe.epochs,
            "seed": self.settings.seed, "params": self.params,
        }  # fmt: skip

    def _restore(self, state: dict) -> None:
        self.learner.load_state_dict(state)
        self.epoch, self.update = state["epoch"], state["update"]
        self.rows, self.unreadable = state["rows"], state["unreadable"]
        self.teacher_top1 = state["teacher_top1"]
        self._new_epoch()
        self.loss_sum += state["loss_sums"][self.ranks.rank]
        self.seconds, self.saved = state["seconds"], self._where()

    def _new_epoch(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds = 0.0

    # Training

    def go(self, save_every: int, eval_every: int, log: Callable[[dict], None] | None) -> dict:
        """Train to the end and write the result.

        Args:
            save_every: Updates between checkpoints.
            eval_every: Epochs between evaluations.
            log: Gets every row of log.csv.

        Returns:
            The content of result.json.
        """
        alone = self.device.type == "cpu" and self.ranks.world_size == 1
        while self.epoch < self.recipe.epochs and not self._has_ended():
            self.learner.begin_epoch(self.epoch)
            self.source.batches.begin(self.epoch, self.update)
            began = time.perf_counter()
            for batch, target, unreadable in self.source.loader:
                images = require_readable(batch, unreadable)
                self._step(images, target)
                self._note_unreadable(unreadable)
                self.update += 1
                saves = self.update % save_every == 0 and self.update < self.updates
                if saves or alone or self.update % POLL == 0 or self.update == self.updates:
                    mean, signal = self._poll()  # waits for the GPU
                    self.seconds += time.perf_counter() - began
                    self._report_update(mean)
                    if saves or signal:
                        self._save()
                    if signal:
                        raise Interrupted(signal, self.saved)
                    began = time.perf_counter()
            row = self._end_epoch(eval_every)
            if log is not None:
                log(row)
        return self._finish()

    def _has_ended(self) -> bool:
        return best_epoch.has_ended(self.rows, self.settings.best, self.settings.patience)

    def _step(self, images: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> None:
        """One update; target: labels (B,), or from a store a pair of tensors of B rows."""
        step = (self.settings.seed, self.epoch, self.update, self.ranks.rank)
        seed = int(np.random.SeedSequence(step).generate_state(1)[0])
        augment.reseed(seed)
        torch.manual_seed(seed)  # the GPU's too
        targets = [target] if isinstance(target, Tensor) else list(target)
        losses = self.learner.step(
            images, targets, self.source.objective, self.source.mixup,
            self.epoch * self.updates + self.update,
        )  # fmt: skip
        for loss in losses:
            self.loss_sum += loss

    def _poll(self) -> tuple[float, int]:
        """The mean loss of this epoch so far, and the signal that came to any rank, or 0."""
        lost, updates = self.ranks.all_reduce(self.loss_sum.item(), self.update)
        mean = lost / updates if updates else 0.0
        self._require(math.isfinite(mean), f"the loss is {mean}")
        return mean, max(self.ranks.all_gather(max(self.signals, default=0)))

    def _require(self, good: bool, what: str) -> None:
        if not good:
            path = self.out / run_folder.CHECKPOINT
            kept = f"{path} is the last good checkpoint" if path.exists() else "nothing was saved"
            raise FloatingPointError(
                f"{what} at {self._where()}; {kept}. Another run may start from it with "
                "a lower lr, more warmup_epochs, clip_grad, or another amp"
            )

    def _where(self) -> str:
        return f"epoch {self.epoch + 1} of {self.recipe.epochs}, update {self.update}"

    # Evaluation

    def _end_epoch(self, eval_every: int) -> dict:
        mean, _ = self._poll()
        self._save()  # evaluation takes its time
        row = {
            "epoch": self.epoch + 1, "lr": self.learner.lr, "loss": mean,
            "images_per_s": self._speed(), "seconds": self.seconds,
        }  # fmt: skip
        if (self.epoch + 1) % eval_every == 0 or self.epoch + 1 == self.recipe.epochs:
            try:
                row["scores"] = self._validate(self.model)
                if self.learner.ema is not None:
                    row["ema"] = self._validate(self.learner.ema.module)
            except FloatingPointError as error:  # from weights that are finite, but only just
                self._require(False, str(error))
        self.rows.append(row)
        best = best_epoch.best_row(self.rows, self.settings.best) if "scores" in row else None
        if self.settings.best and best is row and self.ranks.is_main:
            best_epoch.save(self.out, row["epoch"], self.learner.weights())
        self.epoch, self.update = self.epoch + 1, 0
        self._new_epoch()
        self._save()
        if self.ranks.is_main:
            self._write_log()
            if self.settings.best and best is not None:
                best_epoch.keep_only(self.out, best["epoch"])
        self.report({"event": "epoch", **row})
        if best is not None and self._has_ended() and self.epoch < self.recipe.epochs:
            text = f"stops early: no epoch after {best['epoch']} has a better {self.settings.best}"
            self.report({"event": "note", "text": text})
        return row

    def _validate(self, model: nn.Module) -> dict:
        scores, skipped = validate(
            model, self.validation, self.ranks,
            batch_size=max(self.per_step // self.settings.accum, 1), workers=self.workers,
            dtype=AMP[self.settings.amp], progress=self._stop_on_signal,
        )  # fmt: skip
        self._note_unreadable(skipped)
        return scores

    def _stop_on_signal(self, done: int) -> None:
        if self.signals:
            raise Interrupted(self.signals[0], self.saved)

    # Logging

    def _note_unreadable(self, unreadable: Unreadables) -> None:
        for name, reason in unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.report({"event": "note", "text": f"unreadable, left out: {name}: {reason}"})

    def _report_update(self, mean: float) -> None:
        self.report({
            "event": "update", "epoch": self.epoch, "update": self.update, "loss": mean,
            "lr": self.learner.lr, "images_per_s": self._speed(),
        })  # fmt: skip

    def _speed(self) -> float:
        return self.update * self.recipe.batch / self.seconds if self.seconds else 0.0

    def _write_log(self) -> None:
        """log.csv and unreadable.csv, as of the checkpoint: a row is never there twice."""
        rows = [run_folder.flat(row) for row in self.rows]
        run_folder.write_csv(self.out / run_folder.LOG, rows)
        if self.unreadable:
            named = [{"image": name, "reason": why} for name, why in self.unreadable.items()]
            run_folder.write_csv(self.out / run_folder.UNREADABLE, named)

    # Saving

    def _save(self) -> None:
        parameters = [p for model in self.learner.models for p in model.parameters()]
        good = all(p.isfinite().all() for p in parameters)
        self._require(good, "weights are not finite")
        states = self.ranks.all_gather((self.loss_sum.item(), self.unreadable))
        for _, unreadable in states:
            self._note_unreadable(list(unreadable.items()))
        if self.ranks.is_main:
            checkpoints.save(self.out / run_folder.CHECKPOINT, {
                "identity": self.identity, "epoch": self.epoch, "update": self.update,
                **self.learner.state_dict(),
                "rows": self.rows, "unreadable": self.unreadable,
                "teacher_top1": self.teacher_top1,
                "loss_sums": [loss_sum for loss_sum, _ in states], "seconds": self.seconds,
            })  # fmt: skip
        self.saved = self._where()

    def _finish(self) -> dict:
        """Models and result.json of a run that is through; again if that was interrupted."""
        last = best_epoch.best_row(self.rows, self.settings.best)
        speeds = [row["images_per_s"] for row in self.rows]
        result = last["scores"] | {
            "epoch": last["epoch"], "images_per_s": float(np.median(speeds)),
            "seconds": sum(row["seconds"] for row in self.rows),
            "unreadable": len(self.unreadable),
        }  # fmt: skip
        if self.learner.ema is not None:
            result["ema"] = last["ema"]
        if self.settings.best:
            result |= {
                "best": self.settings.best, "epochs": len(self.rows),
                "stopped_early": len(self.rows) < self.recipe.epochs,
            }  # fmt: skip
        if self.ranks.is_main:
            if self.settings.best:
                self.learner.load_weights(best_epoch.load(self.out, last["epoch"]))
            folders = run_folder.MODEL, run_folder.EMA_MODEL
            for model, folder in zip(self.learner.models, folders, strict=False):
                model = merged(model) if self.settings.lora else model
                save_pretrained(model, self.out / folder, **self.model_args)
            run_folder.write_json(self.out / run_folder.RESULT, result)
        return result


def _split_batch(batch: int, world_size: int, accum: int, mixing: str | None) -> int:
    """Images of one rank in one update. mixing: what needs pairs of them, or None."""
    if batch % (world_size * accum):
        raise ValueError(
            f"batch: {batch}, expected a multiple of {world_size * accum} "
            f"({world_size} ranks, {accum} parts each)"
        )
    mine = batch // world_size
    if mixing and mine % 2:
        raise ValueError(f"batch: {mine} images on each rank, expected an even number for {mixing}")
    return mine
