"""The named models against timm's with the same weights."""

import pytest
import timm
from checking import (
    seed,
    seeded,
)
from modelling import (
    assert_same_logits,
    images,
    randomize,
)
from tiers import slow_but

import deit_fast


@pytest.mark.parametrize("name", slow_but(deit_fast.NAMES, "deit_tiny_distilled"))
def test_named_models_equal_timms(name):
    """Tiny with its 12 blocks; of the wider ones 2, the last one for the prefix tokens."""
    options = {} if "tiny" in name else {"depth": 2}
    seed(0)
    reference = randomize(
        timm.create_model(deit_fast.NAMES[name], **options), seed=seeded(0)
    ).eval()
    fast = getattr(deit_fast, name)(backend="torch", **options).eval()
    assert fast.state_dict().keys() == reference.state_dict().keys()
    fast.load_state_dict(reference.state_dict())
    assert_same_logits(reference, fast, images(reference, batch=1))
