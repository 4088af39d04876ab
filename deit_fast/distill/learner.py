"""A model in training, with all that changes with it: optimizer, schedule, EMA and loss scale."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import Ranks
from .freezing import frozen_modules
from .recipe import Recipe
from .student import AMP, Settings, parameter_groups


class Learner:
    """A model in training.

    Args:
        model: On this rank's device. With the recipe's `freeze` or the settings' `lora`, modules
            whose parameters all need no gradient stay in eval mode.
        settings: Of them accum, amp, compile and lora.
        recipe: Its optimizer, schedule, EMA and clipping.
        updates: In an epoch.
        ranks: Who shares a batch.

    Attributes:
        model: The model itself.
        ema: timm's average of its weights, or None.
        optimizer: timm's.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, recipe: Recipe, updates: int, ranks: Ranks
    ):
        self.model, self.recipe, self.updates = model, recipe, updates
        self.accum, self.amp, self.device = settings.accum, AMP[settings.amp], ranks.device
        self.frozen = frozen_modules(model) if settings.lora or recipe.freeze else []
        self.optimizer = create_optimizer_v2(
            model, recipe.opt, lr=recipe.peak_lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum, param_group_fn=partial(parameter_groups, recipe),
            **({"eps": recipe.opt_eps} if "adam" in recipe.opt else {}),
        )  # fmt: skip
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, "cosine", recipe.epochs, min_lr=recipe.min_lr,
            warmup_epochs=recipe.warmup_epochs, warmup_lr=recipe.warmup_lr,
            step_on_epochs=not recipe.sched_on_updates, updates_per_epoch=updates,
        )  # fmt: skip
        self.ema = ModelEmaV3(model, recipe.ema) if recipe.ema else None
        fp16 = settings.amp == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.ddp = None
        if ranks.world_size > 1:
            self.ddp = DistributedDataParallel(
                model, [self.device.index] if self.device.type == "cuda" else None
            )
        if settings.compile:
            model.compile(mode=settings.compile)

    @property
    def models(self) -> list[nn.Module]:
        """The model, and its average where there is one."""
        return [self.model] + ([] if self.ema is None else [self.ema.module])

    @property
    def lr(self) -> float:
        """The last layer's: with layer_decay those before have less."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def begin_epoch(self, epoch: int) -> None:
        """Set the schedule to an epoch and the model to train mode."""
        self.scheduler.step(epoch)
        (self.model if self.ddp is None else self.ddp).train()
        if self.recipe.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for module in self.frozen:
            module.eval()

    def step(
        self,
        images: Tensor,
        targets: list[Tensor],
        objective: Callable[..., Tensor],
        mixup: Callable[..., tuple[Tensor, ...]] | None,
        number: int,
    ) -> list[Tensor]:
        """Make one update.

        Args:
            images: Of this rank, (B, C, H, W), on any device.
            targets: What `objective` takes after the images, each of B rows.
            objective: (output, images, *targets) -> loss.
            mixup: (images, *targets) -> mixed ones, or None.
            number: Of the update, from the beginning of the run.

        Returns:
            The loss of each of the `accum` parts, divided by how many there are.
        """
        if self.recipe.sched_on_updates:
            self.scheduler.step_update(number)
        images = images.to(self.device, non_blocking=True)
        targets = [t.to(self.device, non_blocking=True) for t in targets]
        if mixup is not None:
            images, *targets = mixup(images, *targets)
        parts = list(zip(*(t.chunk(self.accum) for t in (images, *targets)), strict=True))
        network = self.model if self.ddp is None else self.ddp
        losses = []
        for i, (x, *y) in enumerate(parts, 1):
            waits = self.ddp is not None and i < len(parts)  # gradients are reduced with the last
            with self.ddp.no_sync() if self.ddp and waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    loss = objective(network(x), x, *y) / self.accum
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return losses

    def state_dict(self) -> dict:
        """Everything a checkpoint needs of the learner."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def weights(self) -> dict:
        """The part of `state_dict` that evaluation needs."""
        return {key: value for key, value in self.state_dict().items() if key in ("model", "ema")}

    def load_weights(self, state: dict) -> None:
        """Restore what `weights` returned; further keys are not looked at."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; further keys are not looked at."""
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
