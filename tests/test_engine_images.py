"""Images on their way into an engine: arrays, kinds, and what is refused."""

import numpy as np
import pytest
import torch
from checking import assert_close
from modelling import tiny_pair

from deit_fast import InferenceEngine, _engine_images


def floats(count=2):
    return torch.linspace(-1, 1, count * 3 * 64 * 64).view(count, 3, 64, 64)


def read_only(images):
    array = images.numpy().copy()
    array.flags.writeable = False
    return array


ARRAYS = {
    "as it is": lambda images: images.numpy(),
    "read-only": read_only,
    "negative strides": lambda images: images.flip(3).numpy()[..., ::-1],
    "every second": lambda images: images.repeat_interleave(2, 0).numpy()[::2],
    "of bytes": lambda images: (images.permute(0, 2, 3, 1) * 100 + 100).byte().numpy(),
    "of doubles": lambda images: images.double().numpy(),
}


@pytest.mark.filterwarnings("error")  # PyTorch warns of an array that may not be written to
@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_arrays(name):
    m = tiny_pair(depth=1)[1]
    array = ARRAYS[name](floats())
    expected = torch.from_numpy(array.copy())
    expected = expected.float() if expected.dtype == torch.float64 else expected
    with torch.inference_mode():
        assert_close(InferenceEngine(m, 2)(array), m(expected))


def test_an_array_shares_its_memory_where_it_can():
    array = floats().numpy()
    assert _engine_images.as_tensor(array).data_ptr() == array.ctypes.data
    assert _engine_images.as_tensor(read_only(floats())).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "images, error, message",
    [
        ([1], TypeError, "images: list, expected a torch.Tensor or a numpy array"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), TypeError, "dtype torch.int32"),
        (np.zeros((1, 3, 64, 64), dtype=np.int16), TypeError, "dtype torch.int16"),
        (np.array([["cat"]]), TypeError, "dtype <U3, expected floating point or uint8"),
        (torch.zeros(3, 64, 64), ValueError, r"expected \(B, 3, 64, 64\)"),
        (
            torch.zeros(1, 64, 64, 3),
            ValueError,
            r"shape \(1, 64, 64, 3\), expected \(B, 3, 64, 64\)",
        ),
        (
            torch.zeros(1, 3, 64, 64).byte(),
            ValueError,
            r"expected \(B, 64, 64, 3\) for torch.uint8",
        ),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "on meta, expected cpu or the host"),
    ],
)
def test_images_that_are_none(images, error, message):
    with pytest.raises(error, match=message):
        InferenceEngine(tiny_pair(depth=1)[1], 2)(images)
