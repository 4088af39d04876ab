"""Teachers, and the loss by the paper's equations."""

import pytest
import timm
import torch
from checking import assert_close, seed
from torch.nn import functional as F

import deit_fast
from deit_fast.distill.recipe import load
from deit_fast.distill.teacher import Objective, at_size, load_teacher

CLASSES = 5
RECIPE = load("deit")


def student(name="deit_tiny_distilled", **kwargs):
    seed(0)
    size = {"embed_dim": 32, "depth": 1, "num_heads": 1, "patch_size": 8, "img_size": 16}
    return deit_fast.create_model(name, num_classes=CLASSES, **size | kwargs).eval()


class FixedLogits(torch.nn.Module):
    """A teacher that gives the same logits whatever it sees, and remembers what that was."""

    num_classes = CLASSES
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0)}

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, None

    def forward(self, x):
        self.seen = x
        assert not torch.is_grad_enabled()  # nothing of it is saved for backward
        return self.logits


def equations(method, z, d, y, t):
    """Section 4 of the paper, equations 2 and 3, word by word, in fp64; y is smoothed by 0.1."""
    z, d, t = (x.double() for x in (z, d, t))
    q = F.one_hot(y, CLASSES).double() * 0.9 + 0.1 / CLASSES
    ce = -(q * z.log_softmax(1)).sum(1).mean()
    if method == "soft":  # (1 - lambda) CE(psi(Zs), y) + lambda tau^2 KL(psi(Zs/tau), psi(Zt/tau))
        u, v = (t / 3).softmax(1), (d / 3).softmax(1)
        return 0.9 * ce + 0.1 * 9 * (u * (u / v).log()).sum(1).mean()
    teachers = t.argmax(1)  # 1/2 CE(psi(Zs), y) + 1/2 CE(psi(Zs), yt): yt is not smoothed
    return 0.5 * ce - 0.5 * d.log_softmax(1).gather(1, teachers[:, None]).mean()


@pytest.mark.parametrize("method", ["soft", "hard"])
@pytest.mark.parametrize("token", ["class", "distill"])
def test_the_papers_equations(method, token):
    seed(1)
    z, d, t = torch.randn(3, 7, CLASSES).unbind()
    y, images = torch.randint(CLASSES, (7,)), torch.randn(7, 3, 16, 16)
    objective = Objective(RECIPE, method, FixedLogits(t), student())
    output, heads = ((z, d), (z, d)) if token == "distill" else (z, (z, z))
    got = objective(output, images, y)
    assert_close(got, equations(method, *heads, y, t).float())


def test_mixed_targets_are_not_smoothed_again():
    seed(1)
    z, target = torch.randn(7, CLASSES), torch.rand(7, CLASSES).softmax(1)
    got = Objective(RECIPE, "none", None, student())(z, torch.zeros(7, 3, 16, 16), target)
    expected = F.cross_entropy(z.double(), target.double())
    assert_close(got, expected.float())


def test_the_teacher_sees_its_own_normalisation():
    model, teacher = student(), FixedLogits(torch.zeros(2, CLASSES))
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(config):
        mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
        return (pixels - mean) / std

    Objective(RECIPE, "hard", teacher, model).teach(normalised(model.pretrained_cfg))
    assert_close(teacher.seen, normalised(FixedLogits.pretrained_cfg))
    same = student()
    images = torch.randn(2, 3, 16, 16)
    Objective(RECIPE, "hard", same, model).teach(images)
    twin = FixedLogits(torch.zeros(2, CLASSES))
    twin.pretrained_cfg = twin.pretrained_cfg | {
        k: model.pretrained_cfg[k] for k in ("mean", "std")
    }
    Objective(RECIPE, "hard", twin, model).teach(images)
    assert twin.seen is images  # nothing is computed where they are the same


def test_no_gradient_reaches_the_teacher():
    teacher = student("deit_tiny").requires_grad_(True)
    model = student().train()
    model.set_distilled_training(True)
    images = torch.randn(2, 3, 16, 16)
    Objective(RECIPE, "soft", teacher, model)(
        model(images), images, torch.tensor([0, 1])
    ).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_what_does_not_fit():
    teacher = FixedLogits(torch.zeros(1, CLASSES))
    with pytest.raises(ValueError, match="teacher: none, with distill 'hard'"):
        Objective(RECIPE, "hard", None, student())
    with pytest.raises(ValueError, match="teacher: FixedLogits, with distill 'none'"):
        Objective(RECIPE, "none", teacher, student())
    with pytest.raises(ValueError, match="distill: 'warm', expected one of"):
        Objective(RECIPE, "warm", teacher, student())
    with pytest.raises(ValueError, match="teacher: 3 channels, expected the student's 1"):
        Objective(RECIPE, "hard", teacher, student(in_chans=1))


def test_teachers_from_folders(tmp_path):
    """A transformer of a fixed size is built for the student's pixels; a convnet takes any."""
    vit = student()
    deit_fast.save_pretrained(vit, tmp_path / "vit")
    loaded = load_teacher(tmp_path / "vit", CLASSES, 32)
    assert loaded.patch_embed.img_size == (32, 32) and not loaded.training
    assert isinstance(loaded, deit_fast.layers.VisionTransformerDistilled)
    assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, CLASSES)
    assert not any(p.requires_grad for p in loaded.parameters())
    same = load_teacher(tmp_path / "vit", CLASSES, 16)
    assert torch.equal(same.pos_embed, vit.pos_embed)

    convnet = timm.create_model("test_resnet", num_classes=CLASSES)
    deit_fast.save_pretrained(convnet, tmp_path / "convnet")
    loaded = load_teacher(tmp_path / "convnet", CLASSES, 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), convnet.eval()(x))
    with pytest.raises(ValueError, match="has 5 classes, expected the data's 6"):
        load_teacher(tmp_path / "convnet", 6, 32)


def test_teachers_from_files(tmp_path):
    convnet = timm.create_model("test_resnet", num_classes=CLASSES)
    torch.save({"model": convnet.state_dict()}, tmp_path / "convnet.pth")
    loaded = load_teacher("test_resnet", CLASSES, 32, checkpoint=tmp_path / "convnet.pth")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), convnet.eval()(x))
    with pytest.raises(ValueError, match="head.fc.weight|fc.weight"):
        load_teacher("test_resnet", 6, 32, checkpoint=tmp_path / "convnet.pth")
    with pytest.raises(ValueError, match="expected no checkpoint as well"):
        load_teacher(tmp_path, CLASSES, 32, checkpoint=tmp_path / "convnet.pth")
    deit = deit_fast.deit_tiny(num_classes=CLASSES)
    torch.save(deit.state_dict(), tmp_path / "deit.pth")  # a transformer teaches too (Table 2)
    loaded = load_teacher("deit_tiny", CLASSES, 32, checkpoint=tmp_path / "deit.pth")
    assert loaded.patch_embed.grid_size == (2, 2)
    assert torch.equal(loaded.blocks[3].mlp.fc1.weight, deit.blocks[3].mlp.fc1.weight)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_teacher("test_resnet", CLASSES, 32, checkpoint=tmp_path / "other.pth")


def test_names_mean_the_papers_weights(monkeypatch):
    """regnety_160 is the training that the paper used; and no network is a clear error."""
    asked = []

    def create_model(name, **kwargs):
        asked.append(name)
        raise OSError("no network\nmore")

    monkeypatch.setattr("deit_fast.distill.teacher.create_model", create_model)
    with pytest.raises(
        RuntimeError, match=r"no pretrained weights for regnety_160.* \(no network\)"
    ):
        load_teacher("regnety_160", 1000, 224)
    assert asked == ["regnety_160.deit_in1k"]
    with pytest.raises(ValueError, match="'regnety_9999' is neither a folder nor a name of"):
        load_teacher("regnety_9999", 1000, 224)


def test_a_size_is_asked_for_once_where_it_fits():
    built = []

    def build(**kwargs):
        built.append(kwargs)
        return student(**kwargs)

    at_size(build, 16)
    at_size(build, None)
    assert at_size(build, 32).patch_embed.img_size == (32, 32)
    assert built == [{}, {}, {}, {"img_size": 32}]
