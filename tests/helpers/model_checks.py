"""Checks that every family of models has to pass."""

import copy
import pickle

import torch
from checking import assert_close, assert_differ, assert_equal


def uint8_and_floats(model, size, device):
    """A batch (2, size, size, 3) of uint8 images, and the same normalised, (2, 3, size, size)."""
    image = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=device) for k in ("mean", "std"))
    return image, ((image / 255 - mean) / std).permute(0, 3, 1, 2)


def assert_exports(reference, fast, x):
    """With torch.export for any batch, and runs on the meta device."""
    batch = torch.export.Dim("batch")
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},)).module()
    assert_close(exported(x[:1]), reference(x[:1]))
    with torch.no_grad():
        assert fast.to("meta")(x.to("meta")).shape == (2, 11)


def assert_copies(fast, other, x, backend):
    """Copies, pickles and `other` with the same `state_dict` return the same."""
    with torch.no_grad():
        expected = fast(x)
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(copied) is type(fast) and copied.blocks[0].backend == backend
            assert_equal(copied(x), expected)
        assert_differ(other(x), expected)
        other.load_state_dict(fast.state_dict())
        assert_equal(other(x), expected)


def assert_awkward_batches(fast, x, expected):
    """No image, one image, other strides, and NaN in one image alone; x has 3 images or more."""
    with torch.no_grad():
        assert fast(x[:0]).shape == (0, 11)
        assert_close(fast(x[:1]), expected[:1])
        assert_close(fast(x.to(memory_format=torch.channels_last)), expected)
        wide = torch.nn.functional.pad(x, (5, 5))[..., 5:-5]
        assert_close(fast(wide), expected)
        x[1, 0, 0, 0] = torch.nan
        got = fast(x)
    assert got[1].isnan().all()
    assert_close(torch.cat((got[:1], got[2:])), torch.cat((expected[:1], expected[2:])))
