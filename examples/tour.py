# %% [markdown]
# # A tour of deit_fast
#
# Load a model, replace its modules, compare it with timm's, time both, classify, quantize, plot.
# The cells run in Jupyter (after `jupytext --to ipynb examples/tour.py`) and VS Code as they
# stand; the file is a script as well: `python examples/tour.py`. It needs no network and no GPU.
# With a GPU it uses it, and the kernels run.

# %%
import copy
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch

import deit_fast
from deit_fast.attention_weights import token_maps
from deit_fast.batch_inference import label_names
from deit_fast.engine import data_config
from deit_fast.images import Decoder

device, dtype = ("cuda", torch.half) if torch.cuda.is_available() else ("cpu", torch.float)
where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
shipped = Path(deit_fast.__file__).with_name("data")  # images that come with the package
print(f"deit_fast {deit_fast.__version__}, torch {torch.__version__}, {dtype} on {where}")

# %% [markdown]
# ## Load
# A model of timm's, with random weights: the pretrained ones come from the network
# (`pretrained=True`). What it computes is the same computation; the classes that it names mean
# nothing.

# %%
torch.manual_seed(0)
theirs = timm.create_model("deit_tiny_distilled_patch16_224").to(device, dtype).eval()

# %% [markdown]
# Images are decoded to bytes, (B, H, W, 3), by timm's evaluation transform, stopped before it
# normalises.

# %%
decode = Decoder(data_config(theirs))
photographs = sorted(shipped.glob("*.jpg"))
pixels = torch.from_numpy(np.stack([decode(path) for path in photographs])).to(device)
print(*(path.stem for path in photographs), tuple(pixels.shape), pixels.dtype)

# %% [markdown]
# ## Swap
# `accelerate` replaces the modules of a model in place. Parameters and their names stay;
# `restore` is the way back. The report says what was replaced, and what was skipped and why.

# %%
ours = copy.deepcopy(theirs)
print(deit_fast.accelerate(ours))
assert ours.state_dict().keys() == theirs.state_dict().keys()

# %% [markdown]
# ## Compare
# The same logits, apart by roundings of the dtype. Ours takes the bytes as they are and
# normalises them itself.

# %%
config = data_config(theirs)
mean, std = (torch.tensor(config[key], device=device) for key in ("mean", "std"))
images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
with torch.inference_mode():
    expected, got, of_bytes = theirs(images), ours(images), ours(pixels)


def relative_error(logits, reference):
    return ((logits.double() - reference.double()).norm() / reference.double().norm()).item()


print(f"logits against timm's: {relative_error(got, expected):.1e} relative error, ", end="")
print(f"{relative_error(of_bytes, expected):.1e} from bytes")
assert relative_error(got, expected) < (1e-5 if dtype == torch.float else 1e-2)

# %% [markdown]
# ## Throughput on this machine
# Both models in turn, the median of five runs each. `InferenceEngine` replays CUDA graphs on a
# GPU; on a CPU it calls the model. What is printed here holds for this machine and this minute;
# `deit-fast bench` measures with more care.

# %%
batch = 256 if device == "cuda" else 4
many = images.repeat(batch // len(images), 1, 1, 1)
engine = deit_fast.InferenceEngine(ours, batch_sizes=(batch,))
calls, seconds = {"timm": theirs, "deit_fast": ours, "deit_fast, engine": engine}, {}
with torch.inference_mode():
    for turn in range(6):
        for name, call in calls.items():
            began = time.perf_counter()
            call(many).sum().item()  # waits for the device
            if turn > 0:  # the first run of each warms up
                seconds.setdefault(name, []).append(time.perf_counter() - began)
rates = {name: batch / median(times) for name, times in seconds.items()}
for name, rate in rates.items():
    print(f"{name}: {rate:,.1f} images/s at batch {batch}, {rate / rates['timm']:.2f} times timm's")

# %% [markdown]
# ## Classify
# `deit_nano_fashion` is a small distilled DeiT whose weights come with the package, trained on
# Fashion-MNIST. Its ten images are of the test set, one of each class.

# %%
nano = deit_fast.deit_nano_fashion(pretrained=True).to(device, dtype).eval()
paths, labels = sorted((shipped / "fashion").glob("*.png")), label_names(nano)
decode = Decoder(data_config(nano))
clothes = torch.from_numpy(np.stack([decode(path) for path in paths])).to(device)
with torch.inference_mode():
    logits = nano(clothes)
scores, classes = logits.float().softmax(-1).max(-1)
for path, score, index in zip(paths, scores.tolist(), classes.tolist(), strict=True):
    print(f"{path.stem}: {labels[index]} ({score:.0%})")

# %% [markdown]
# ## Quantize
# The GEMMs of every block in FP8 (GPUs of compute capability 8.9 or more) or INT8 (8.0 or more).
# On a CPU PyTorch computes both, more slowly than fp32: there they are for checking.

# %%
for fmt in ("fp8", "int8"):
    quantized = copy.deepcopy(nano)
    try:
        report = deit_fast.quantize(quantized, fmt)
    except RuntimeError as error:  # this GPU has no such matmuls
        print(f"{fmt}: {error}")
        continue
    with torch.inference_mode():
        got = quantized(clothes)
    same = (got.argmax(-1) == classes).sum().item()
    error = relative_error(got, logits)
    print(f"{fmt}: {len(report.quantized)} layers, {error:.1e} relative error, ", end="")
    print(f"the same class for {same} of {len(paths)} images")

# %% [markdown]
# ## Plot
# Where the class token of the last block looks, the mean over its heads. matplotlib comes with
# `pip install 'deit_fast[train]'`.

# %%
if find_spec("matplotlib") is None:
    print("no plot: matplotlib is not installed; pip install 'deit_fast[train]' brings it")
else:
    import matplotlib.pyplot as plt

    (weights,) = deit_fast.attention_maps(nano, clothes, blocks=-1).values()
    maps = token_maps(nano, clothes, weights.mean(1))["class"]
    figure, axes = plt.subplots(
        2, len(paths), figsize=(1.4 * len(paths), 3.2), layout="constrained"
    )
    for column, index in enumerate(classes.tolist()):
        image, attention = clothes[column].cpu(), maps[column].cpu()
        axes[0, column].imshow(image, cmap="gray")
        axes[0, column].set_title(labels[index], fontsize=9)
        axes[1, column].imshow(attention, cmap="viridis")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig("tour.png", dpi=120)
    print(f"plotted to {Path('tour.png').resolve()}")
