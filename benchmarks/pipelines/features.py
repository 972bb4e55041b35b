"""What people switch on in a pipeline of diffusers, as one function each.

A feature is set up in the same way on a dense pipeline and on one that is compiled; the comparison
of the two is in `measure.py`. What needs an accelerator is exercised as far as a CPU allows, and
`note` says how far that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.pipelines.tiny import TinyPipeline

STEPS = 3
Call = dict[str, Any]
Calls = Callable[[Any, TinyPipeline], Iterator[Call]]


@dataclass(frozen=True)
class Feature:
    """One column of the matrix.

    Attributes:
        name: as the page shows it.
        set_up: changes the pipeline before it is compiled; gets a scratch folder.
        calls: yields the arguments of one call of the pipeline after the other, and may change the
            pipeline in between.
        note: how it is exercised, for the page.
        recompiles: whether a call after the first may compile again.
    """

    name: str
    set_up: Callable[[Any, Path], None] = lambda pipe, folder: None
    calls: Calls = lambda pipe, tiny: iter([tiny.arguments() | tiny.sizes[0]])
    note: str = ""
    recompiles: bool = True


FEATURES: dict[str, Feature] = {}


def feature(
    name: str, note: str = "", **more: Any
) -> Callable[[Callable[[Any, Path], None]], Feature]:
    """Register the decorated function as `set_up` of a feature."""

    def register(set_up: Callable[[Any, Path], None]) -> Feature:
        FEATURES[name] = Feature(name, set_up, note=note, **more)
        return FEATURES[name]

    return register


def _nothing(pipe: Any, folder: Path) -> None:
    """Some features are in the calls alone."""


feature("nothing else")(_nothing)


def _guided(pipe: Any, tiny: TinyPipeline) -> Iterator[Call]:
    yield tiny.arguments(guided=True) | tiny.sizes[0]


feature(
    "classifier-free guidance",
    "A negative prompt: a second call of the transformer per step, or a batch of two, as the "
    "pipeline does it.",
    calls=_guided,
)(_nothing)


def _resolutions(pipe: Any, tiny: TinyPipeline) -> Iterator[Call]:
    for size in (*tiny.sizes, tiny.sizes[0]):
        yield tiny.arguments() | size


feature("changing resolution", "Three calls with two sizes.", calls=_resolutions)(_nothing)


@feature(
    "model CPU offload",
    '`enable_model_cpu_offload(device="cpu")`: the hooks are installed and run, and send to the '
    "CPU what is there already.",
)
def model_offload(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _group_offload(pipe: Any, folder: Path, **settings: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_to_disk_path=str(folder),
        **settings,
    )


_TO_DISK = (
    "Offloaded to disk, since there is no accelerator: between calls the weights are "
    "uninitialised memory, so a missed load would show. No streams."
)


@feature("group offload, blocks", _TO_DISK)
def group_offload_blocks(pipe: Any, folder: Path) -> None:
    _group_offload(pipe, folder, offload_type="block_level", num_blocks_per_group=1)


@feature("group offload, leaves", _TO_DISK)
def group_offload_leaves(pipe: Any, folder: Path) -> None:
    _group_offload(pipe, folder, offload_type="leaf_level")


def lora(pipe: Any, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA for the attention of the pipeline's transformer, as a checkpoint would hold it."""
    generator = torch.Generator().manual_seed(seed)
    transformer = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    state: dict[str, torch.Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v")):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            state[f"transformer.{name}.lora_A.weight"] = down / module.in_features**0.5
            state[f"transformer.{name}.lora_B.weight"] = up / rank**0.5
    return state


@feature("LoRA loaded")
def lora_loaded(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(lora(pipe, seed=1), adapter_name="style")


@feature("LoRA fused")
def lora_fused(pipe: Any, folder: Path) -> None:
    lora_loaded.set_up(pipe, folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _swapped(pipe: Any, tiny: TinyPipeline) -> Iterator[Call]:
    yield tiny.arguments() | tiny.sizes[0]
    # Names of layers are taken from an untouched pipeline: PEFT has changed those of this one.
    pipe.load_lora_weights(lora(tiny.build(), seed=2), adapter_name="style", hotswap=True)
    yield tiny.arguments() | tiny.sizes[0]


@feature(
    "LoRA hot-swapped",
    "Two calls, another LoRA before the second one; nothing may be compiled again.",
    calls=_swapped,
    recompiles=False,
)
def lora_swapped(pipe: Any, folder: Path) -> None:
    pipe.enable_lora_hotswap(target_rank=8)
    lora_loaded.set_up(pipe, folder)


@feature("FirstBlockCache", "A threshold that reuses the later blocks from the second step on.")
def first_block_cache(pipe: Any, folder: Path) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))


_SKIPPED = (-1, 900)  # time steps in which a cache may be used: all but the first


@feature("FasterCache", "For guidance-distilled models, without the guidance part.")
def faster_cache(pipe: Any, folder: Path) -> None:
    from diffusers import FasterCacheConfig

    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=_SKIPPED,
            is_guidance_distilled=True,
            attention_weight_callback=lambda module: 0.5,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


@feature("Pyramid attention broadcast")
def pyramid_attention_broadcast(pipe: Any, folder: Path) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=_SKIPPED,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


@feature("MagCache")
def mag_cache(pipe: Any, folder: Path) -> None:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=1.0, retention_ratio=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    pipe.transformer.enable_cache(config)


@feature("TaylorSeer")
def taylorseer(pipe: Any, folder: Path) -> None:
    from diffusers import TaylorSeerCacheConfig

    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"(\w+_)?blocks\.\d+\.attn1?"],
        )
    )


@feature("layerwise casting", "Weights stored as float8_e4m3fn, computed in float32.")
def layerwise_casting(pipe: Any, folder: Path) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


@feature("torchao int8 weights", "`TorchAoConfig(Int8WeightOnlyConfig())` in `from_pretrained`.")
def torchao_int8(pipe: Any, folder: Path) -> None:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe.transformer.save_pretrained(folder)
    pipe.transformer = type(pipe.transformer).from_pretrained(
        folder,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )
