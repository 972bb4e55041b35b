"""Ten photographs that come inside the scikit-image and scikit-learn wheels."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Photo:
    """One photograph: its class name, its file in an installed package, and the square to take."""

    name: str
    package: str
    file: str
    centre: tuple[float, float] = (0.5, 0.5)
    """Centre of the square as fractions of width and height."""
    side: float = 1.0
    """Side of the square as a fraction of the shorter side."""

    def path(self) -> Path:
        """The file, found without importing the package."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"photo {self.name!r} is part of the package {self.package!r}, which is not "
                f"installed; run: pip install scikit-image scikit-learn"
            )
        return Path(spec.origin).parent / self.file

    def square(self, pixels: int) -> Image.Image:
        """The chosen square, `pixels` wide."""
        with Image.open(self.path()) as opened:
            image = opened.convert("RGB")
        side = self.side * min(image.size)
        left = min(max(self.centre[0] * image.width - side / 2, 0.0), image.width - side)
        top = min(max(self.centre[1] * image.height - side / 2, 0.0), image.height - side)
        box = (left, top, left + side, top + side)
        return image.resize((pixels, pixels), Image.Resampling.LANCZOS, box=box)


# The position in this table is the class label that the weights were trained with.
PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", (0.45, 0.33), 0.65),
    Photo("brick", "skimage", "data/brick.png"),
    Photo("cameraman", "skimage", "data/camera.png", (0.42, 0.35), 0.7),
    Photo("cat", "skimage", "data/chelsea.png", (0.5, 0.5)),
    Photo("coffee", "skimage", "data/coffee.png", (0.47, 0.5)),
    Photo("coins", "skimage", "data/coins.png", (0.35, 0.5), 0.8),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", (0.46, 0.45), 0.9),
    Photo("pagoda", "sklearn", "datasets/images/china.jpg", (0.35, 0.5)),
    Photo("retina", "skimage", "data/retina.jpg"),
    Photo("rocket", "skimage", "data/rocket.jpg", (0.5, 0.5)),
)

NAMES = tuple(photo.name for photo in PHOTOS)


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # [B, 3, S, S] in [-1, 1]
    label: Tensor  # [B] int64
    view: Tensor  # [B, 4] top, left, bottom, right as fractions of the picture


class PhotoSet:
    """The photographs at one resolution, cropped with a random offset.

    The offset is a whole number of pixels, so no crop is blurred by resampling. Up to 1/32 of the
    side moves: enough that the picture is drawn from the noise and not looked up, too little to
    lose the subject.
    """

    def __init__(self, grid: int, patch: int) -> None:
        self.grid = grid
        self.patch = patch
        self.margin = grid * patch // 32
        side = grid * patch + self.margin
        arrays = [np.asarray(photo.square(side)) for photo in PHOTOS]
        stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        self.photos = stacked.to(torch.float32) / 127.5 - 1  # [N, 3, side, side]

    def batch(self, count: int, window: int, generator: torch.Generator) -> Batch:
        """`count` random windows of `window x window` patches."""
        label = torch.randint(len(PHOTOS), (count,), generator=generator)
        jitter = torch.randint(self.margin + 1, (count, 2), generator=generator).tolist()
        corner = torch.randint(self.grid - window + 1, (count, 2), generator=generator)
        pixels = []
        for photo, (dy, dx), (row, col) in zip(
            self.photos[label], jitter, corner.tolist(), strict=True
        ):
            top, left = row * self.patch + dy, col * self.patch + dx
            size = window * self.patch
            pixels.append(photo[:, top : top + size, left : left + size])
        view = torch.cat((corner, corner + window), dim=1) / self.grid
        return Batch(torch.stack(pixels), label, view)
