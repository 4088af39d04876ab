"""Files as the trainers that people use write them, by those trainers' own calls where they are
installed, and by the same calls with the same names where they are not (DeiT's code, DINO, MAE)."""

import argparse
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import selection
import timm
import torch
from checking import assert_close, assert_differ, assert_equal, seed
from modelling import TINY, randomize
from timm.models.vision_transformer import Block, VisionTransformer
from timm.scheduler import create_scheduler
from timm.utils import CheckpointSaver, ModelEma, ModelEmaV3, NativeScaler, get_state_dict
from torch import nn

import deit_fast

DISTILLED, PLAIN = "deit_tiny_distilled", "deit_tiny"


def theirs(name=PLAIN, seed=0, **options):
    return randomize(timm.create_model(f"{name}_patch16_224", **TINY | options), seed=seed)


def load(path, name=PLAIN, **options):
    """Our model; `num_classes` is timm's unless the test says it."""
    given = {k: v for k, v in TINY.items() if k != "num_classes"} | options
    return deit_fast.create_model(name, checkpoint=path, backend="torch", **given)


def assert_weights(model, expected):
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        assert_equal(got[name], expected[name], name)


def stepped(model):
    """An optimizer that has a state of everything, and has changed nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.fixture
def silent():
    """Nothing is left out, nothing is newly initialized."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "checkpoint")
        yield


# DeiT and timm


@pytest.mark.parametrize("key", [None, "model", "model_ema"])
def test_deits_training_code(key, tmp_path, silent):
    """main.py: save_on_master({...}, output_dir / 'checkpoint.pth')."""
    args = argparse.Namespace(
        model="deit_tiny_distilled_patch16_224", epochs=300, sched="cosine", warmup_lr=1e-6,
        lr=np.float64(5e-4), min_lr=1e-5, warmup_epochs=5, cooldown_epochs=10, opt_betas=None,
        decay_rate=0.1, lr_noise=None, output_dir="runs", data_path=Path("/imagenet"),
    )  # fmt: skip
    model = theirs(DISTILLED)
    optimizer = stepped(model)
    scheduler, _ = create_scheduler(args, optimizer)
    model_ema = ModelEma(model, decay=0.99996)
    randomize(model_ema.ema, seed=1)
    torch.save({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(), "epoch": 7,
        "model_ema": get_state_dict(model_ema),
        "scaler": torch.amp.GradScaler("cpu").state_dict(), "args": args,
    }, tmp_path / "checkpoint.pth")  # fmt: skip
    expected = (model_ema.ema if key == "model_ema" else model).state_dict()
    got = load(tmp_path / "checkpoint.pth", DISTILLED, num_classes=11, checkpoint_key=key)
    assert_weights(got, expected)


@pytest.mark.parametrize("key", [None, "state_dict", "state_dict_ema"])
def test_timms_training_script(key, tmp_path, silent):
    model = theirs()
    ema = ModelEmaV3(model)
    randomize(ema.module, seed=1)
    scaler = NativeScaler(device="cpu")
    saver = CheckpointSaver(
        torch.compile(model), stepped(model), model_ema=ema, amp_scaler=scaler,
        args=argparse.Namespace(model="deit_tiny_patch16_224", mean=None, opt_kwargs={"a": 1}),
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(3, metric=np.float64(71.2))
    expected = (ema.module if key == "state_dict_ema" else model).state_dict()
    for name in ("last.pth.tar", "model_best.pth.tar"):
        got = load(tmp_path / name, num_classes=11, checkpoint_key=key)
        assert_weights(got, expected)


# DINO


class MultiCropWrapper(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        backbone.fc, backbone.head = nn.Identity(), nn.Identity()
        self.backbone, self.head = backbone, head


class DINOHead(nn.Module):
    def __init__(self, width, out=13, hidden=17, bottleneck=8):
        super().__init__()
        linears = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out, bias=False))


class DINOLoss(nn.Module):
    def __init__(self, out=13):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out))


@pytest.fixture
def dino(tmp_path):
    """(the file that main_dino.py writes, its two backbones' weights)"""
    nets = []
    for number in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            nets.append(MultiCropWrapper(theirs(seed=number, num_classes=0), DINOHead(64)))
    student, teacher = nets
    weights = [net.backbone.state_dict() for net in nets]
    torch.save({
        "student": nn.DataParallel(student).state_dict(), "teacher": teacher.state_dict(),
        "optimizer": stepped(student).state_dict(), "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", global_crops_scale=(0.4, 1.0)),
        "dino_loss": DINOLoss().state_dict(), "fp16_scaler": {"scale": 65536.0},
    }, tmp_path / "checkpoint.pth")  # fmt: skip
    return tmp_path / "checkpoint.pth", *weights


def test_dinos_checkpoint_must_be_told_which_network(dino):
    with pytest.raises(ValueError) as error:
        load(dino[0], num_classes=0)
    listed = "'student' (38 tensors), 'teacher' (38 tensors), 'dino_loss' (1 tensor)"
    assert str(error.value).endswith(f"or several, expected as checkpoint_key one of {listed}")


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_dinos_backbones_without_their_projection_head(key, dino):
    path, student, teacher = dino
    with pytest.warns(UserWarning, match=r"head.mlp, head.last_layer left out: only pretraining"):
        model = load(path, num_classes=0, checkpoint_key=key)
    assert_weights(model, student if key == "student" else teacher)


def test_a_backbone_alone_may_be_asked_for(dino, silent):
    inside = "module.backbone"  # as the file has it
    assert_weights(load(dino[0], num_classes=0, checkpoint_key=f"student.{inside}"), dino[1])


@pytest.fixture
def backbone(tmp_path):
    """dino_deitsmall16_pretrain.pth: names with tensors, no head."""
    state = theirs(num_classes=0).state_dict()
    torch.save(state, tmp_path / "pretrain.pth")
    return tmp_path / "pretrain.pth", state


def test_a_backbone_without_a_classifier(backbone, silent):
    path, state = backbone
    assert_weights(load(path, num_classes=0), state)
    larger = load(path, num_classes=0, img_size=96)
    assert larger.pos_embed.shape == (1, 37, 64)
    assert_equal(larger.norm.weight, state["norm.weight"])


def test_a_classifier_for_a_backbone_is_asked_for_and_newly_initialized(backbone, dino):
    path, state = backbone
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).splitlines()[1:] == [
        "  missing: head.weight, head.bias",
        "  no classifier in it: expected num_classes=0, or the number of classes for a new one",
    ]
    seed(3)
    fresh = timm.create_model("deit_tiny_patch16_224", **TINY | {"num_classes": 5}).state_dict()
    seed(3)
    with pytest.warns(
        UserWarning, match="has no head.weight, head.bias: they are newly initialized"
    ):
        model = load(path, num_classes=5)
    assert_weights(model, fresh | state)
    seed(3)
    with pytest.warns(UserWarning) as caught:
        model = load(dino[0], num_classes=5, checkpoint_key="teacher")
    assert_weights(model, fresh | dino[2])
    notes = [str(w.message).partition(": ")[2] for w in caught]
    assert notes == [
        "head.mlp, head.last_layer left out: only pretraining uses them",
        "has no head.weight, head.bias: they are newly initialized",
    ]
    assert {w.filename for w in caught} == {__file__}


def test_only_a_head_that_is_not_there_at_all_is_new(backbone):
    path, state = backbone
    torch.save(state | {"head.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match="missing: head.weight$"):
        load(path, num_classes=5)
    torch.save({k: t for k, t in state.items() if k != "norm.bias"}, path)
    with pytest.raises(ValueError, match="missing: norm.bias$"):
        load(path, num_classes=5)


# MAE


class MaskedAutoencoderViT(nn.Module):
    """The names of models_mae.py; the encoder is a timm model without a head."""

    def __init__(self, encoder, width=32):
        super().__init__()
        for name in ("patch_embed", "blocks", "norm"):
            self.add_module(name, getattr(encoder, name))
        self.cls_token, self.pos_embed = encoder.cls_token, encoder.pos_embed
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 17, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(width, 2, qkv_bias=True) for _ in range(2)])
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 16 * 16 * 3)


def save_model(model, path):
    """util/misc.py"""
    torch.save({
        "model": model.state_dict(), "optimizer": stepped(model).state_dict(), "epoch": 799,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(mask_ratio=0.75, output_dir=Path("out"), dist_on_itp=False),
    }, path)  # fmt: skip


MAE_ONLY = (
    "mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm, decoder_pred"
)


def test_maes_encoder_without_its_decoder(tmp_path, recwarn):
    path, encoder = tmp_path / "checkpoint-799.pth", theirs(num_classes=0)
    save_model(MaskedAutoencoderViT(encoder), path)
    assert_weights(load(path, num_classes=0), encoder.state_dict())
    (warning,) = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert warning.endswith(f": {MAE_ONLY} left out: only pretraining uses them")
    torch.save({"model": encoder.state_dict()}, path)  # mae_pretrain_vit_base.pth
    recwarn.clear()
    assert_weights(load(path, num_classes=0), encoder.state_dict())
    assert not [w for w in recwarn if "checkpoint" in str(w.message)]


class FinetunedMAE(VisionTransformer):
    """models_vit.py with --global_pool"""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.fc_norm = kwargs["norm_layer"](kwargs["embed_dim"])
        del self.norm

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))


def test_maes_finetuned_classifier(tmp_path, silent):
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = randomize(FinetunedMAE(norm_layer=norm, **TINY))
    path = tmp_path / "checkpoint-99.pth"
    save_model(model, path)
    got = load(path, num_classes=11, global_pool="avg").eval()
    assert_weights(got, model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(got(x), model.eval()(x))
    with pytest.raises(ValueError) as error:
        load(path, num_classes=11)
    assert str(error.value).splitlines()[1:] == [
        "  missing: norm.weight, norm.bias",
        "  unexpected: fc_norm.weight, fc_norm.bias",
        "  its norm comes after the pooling: expected global_pool='avg'",
    ]


# Lightning


@pytest.mark.slow
def test_lightnings_checkpoints(tmp_path):
    selection.extra("tools", "lightning")
    import lightning
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Classifier(lightning.LightningModule):
        def __init__(self, config, lr=1e-3, weighted=False, compiled=False):
            super().__init__()
            self.save_hyperparameters()
            self.model = theirs()
            if compiled:
                self.model = torch.compile(self.model, backend="eager")
            self.weight = nn.Parameter(torch.ones(())) if weighted else 1.0

        def training_step(self, batch, index):
            loss = self.weight * self.model(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    config = argparse.Namespace(data=Path("images"), sizes=(64, 64))
    for options in ({}, {"compiled": True}, {"weighted": True}):
        module = Classifier(config, **options)
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[ModelCheckpoint(tmp_path, monitor="loss"), EarlyStopping("loss")],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(2, 3, 64, 64), batch_size=2))
        path = tmp_path / "model.ckpt"
        trainer.save_checkpoint(path)
        expected = getattr(module.model, "_orig_mod", module.model).state_dict()
        assert_differ(expected["norm.weight"], theirs().norm.weight)  # it was trained
        key = None
        if options.get("weighted"):
            listed = "'state_dict.model' .32 tensors., 'state_dict.weight' .1 tensor.$"
            with pytest.raises(ValueError, match=f"several networks, expected .* one of {listed}"):
                load(path, num_classes=11)
            key = "state_dict.model"
        assert_weights(load(path, num_classes=11, checkpoint_key=key), expected)
