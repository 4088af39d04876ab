"""What a model's logits say after a calibration: probabilities, and whether a picture is known.

    p = softmax(z / T)                one temperature T (Guo et al. 2017, On Calibration of Modern
                                      Neural Networks, section 4.2)
    s = max_i z_i                     "max_logit" (Hendrycks et al. 2022, Scaling
                                      Out-of-Distribution Detection for Real-World Settings)
    s = log sum_i exp(z_i)            "energy" (Liu et al. 2020, Energy-based Out-of-distribution
                                      Detection, equation 4, its sign turned, temperature 1)

A picture is unknown where s is below the threshold; s does not depend on T. z are the logits of
what the model returns with its `heads`; of "joint_softmax" the logarithm of the mean probability.

A folder of weights keeps both in its config.json, and a model in `pretrained_cfg["calibration"]`:

    {"temperature": 1.3, "unknown": {"score": "max_logit", "threshold": 2.1, "kept": 0.95}}

`deit_fast.finetune.calibration` finds them, `deit_fast.batch_inference.Predictor` uses them.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._names import UNKNOWN_SCORES as SCORES

KEY = "calibration"  # of config.json and of pretrained_cfg


@dataclass(frozen=True)
class Unknown:
    """How unknown pictures are told.

    Attributes:
        score: One of `SCORES`.
        threshold: A picture whose score is below it is unknown.
        kept: The share, from 0 to 1, of the pictures it was found on, those alone that the model
            classified correctly, whose score is not below it.
    """

    score: str
    threshold: float
    kept: float


@dataclass(frozen=True)
class Calibration:
    """A temperature, and how unknown pictures are told.

    Attributes:
        temperature: By which logits are divided before the softmax; above 0.
        unknown: None: no picture is unknown.
    """

    temperature: float = 1.0
    unknown: Unknown | None = None

    def as_dict(self) -> dict:
        """Return what a config.json holds."""
        found = asdict(self)
        return found if self.unknown is not None else {"temperature": self.temperature}


def read(stored: Any) -> Calibration:
    """Read what a config.json holds.

    Raises:
        ValueError: It is no calibration.
    """
    try:
        unknown = stored.get("unknown")
        if unknown is not None:
            unknown = Unknown(
                unknown["score"], float(unknown["threshold"]), float(unknown.get("kept", math.nan))
            )
        found = Calibration(float(stored["temperature"]), unknown)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"calibration: {stored!r} has no {error}") from error
    if not 0 < found.temperature < math.inf:
        raise ValueError(f"calibration: temperature {found.temperature}, expected more than 0")
    if unknown is not None and (unknown.score not in SCORES or math.isnan(unknown.threshold)):
        raise ValueError(
            f"calibration: score {unknown.score!r}, threshold {unknown.threshold}, expected one of "
            f"{SCORES} and a number"
        )
    return found


def of(model: nn.Module) -> Calibration | None:
    """Return a model's calibration; None where it has none."""
    stored = (getattr(model, "pretrained_cfg", None) or {}).get(KEY)
    return None if stored is None else read(stored)


def attach(model: nn.Module, calibration: Calibration | None) -> None:
    """Give a model this calibration, or none."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    cfg = {k: v for k, v in cfg.items() if k != KEY}  # timm may share it between models
    if calibration is not None:
        cfg[KEY] = calibration.as_dict()
    model.pretrained_cfg = cfg


def logits_of(output: Tensor, heads: str | None) -> Tensor:
    """Return logits whose softmax is what the model predicts.

    Args:
        output: (B, classes), what the model returned.
        heads: The model's, see `deit_fast.set_heads`; None: it has one head.

    Returns:
        (B, classes) fp32.
    """
    output = output.float()
    if heads != "joint_softmax":
        return output
    return (output / 2).clamp_min(torch.finfo(torch.float32).tiny).log()


def scores(logits: Tensor, score: str) -> Tensor:
    """Score how well a model knows each picture: the higher the better.

    Args:
        logits: (B, classes) fp32, from `logits_of`, not divided by a temperature.
        score: One of `SCORES`.

    Returns:
        (B,) fp32.
    """
    return logits.amax(-1) if score == "max_logit" else logits.logsumexp(-1)
