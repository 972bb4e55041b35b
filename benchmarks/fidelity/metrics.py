"""Distances between an approximation and dense attention, and how sure their means are."""

import math
import statistics
from collections.abc import Sequence

import torch
from scipy.stats import t as student
from skimage.metrics import structural_similarity
from torch import Tensor

CONFIDENCE = 0.95


def relative_l2(out: Tensor, dense: Tensor) -> float:
    """`|out - dense| / |dense|`; infinite where a value is not finite."""
    if not bool(out.isfinite().all()):
        return math.inf
    dense = dense.double()
    return float((out.double() - dense).norm() / dense.norm().clamp_min(1e-300))


def cosine(out: Tensor, dense: Tensor) -> float:
    """Cosine of the angle between the two, taken as vectors."""
    return float(torch.cosine_similarity(out.double().flatten(), dense.double().flatten(), dim=0))


def sqnr_db(error: float) -> float:
    """Signal to quantisation noise in dB, of a relative error."""
    return -20 * math.log10(max(error, 1e-12))


def psnr_db(picture: Tensor, dense: Tensor) -> float:
    """Peak signal to noise of two pictures in [-1, 1], clamped as they are shown."""
    error = (picture.clamp(-1, 1) - dense.clamp(-1, 1)).double().square().mean() / 4
    return float(-10 * torch.log10(error.clamp_min(1e-15)))


def ssim(picture: Tensor, dense: Tensor) -> float:
    """Structural similarity of two pictures [C, S, S] in [-1, 1]."""
    a, b = (x.clamp(-1, 1).numpy() for x in (picture, dense))
    return float(structural_similarity(a, b, channel_axis=0, data_range=2.0))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-12)) for v in values))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), spread * float(
        student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    )
