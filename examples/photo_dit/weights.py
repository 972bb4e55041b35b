"""The weights file: float16 tensors, with the configuration and origin as metadata."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import DiTConfig, PhotoDiT

WEIGHTS = Path(__file__).parent / "photo_dit.safetensors"


def save_weights(
    state: dict[str, Tensor], config: DiTConfig, origin: dict[str, object], path: Path = WEIGHTS
) -> None:
    """Store `state` in half the space; `origin` says how it was made."""
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}
    metadata = {"config": json.dumps(config.to_dict()), "origin": json.dumps(origin)}
    save_file(half, str(path), metadata=metadata)


def load_model(path: Path = WEIGHTS) -> PhotoDiT:
    """The model in float32, ready for inference."""
    with safe_open(str(path), framework="pt") as file:
        config = DiTConfig(**json.loads(file.metadata()["config"]))
        state = {name: file.get_tensor(name).to(torch.float32) for name in file.keys()}  # noqa: SIM118
    model = PhotoDiT(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def origin(path: Path = WEIGHTS) -> dict[str, object]:
    """Command, seed, steps and loss of the run that made the file."""
    with safe_open(str(path), framework="pt") as file:
        stored: dict[str, object] = json.loads(file.metadata()["origin"])
    return stored
