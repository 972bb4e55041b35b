"""Joint attention over text and packed image tokens, in the manner of FLUX."""

from __future__ import annotations

import torch
from torch import Tensor, randn

from .case import Inputs, diffusers_case

TEXT, SIDE = 40, 16


def grid(side: int = SIDE, axes: int = 3) -> Tensor:
    """Position ids of a square image."""
    ones = [torch.arange(1)] * (axes - 2)
    ids = torch.cartesian_prod(*ones[:1], torch.arange(side), torch.arange(side), *ones[1:])
    return ids.float()


def padded_text(*valid: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """A text mask, one row per given number of tokens; the rest of each row is padding."""
    lengths = torch.tensor(valid or (30,))
    return (torch.arange(TEXT) < lengths[:, None]).to(dtype)


def _packed(ids: bool = True, **more: object) -> Inputs:
    inputs: Inputs = {
        "hidden_states": randn(1, SIDE * SIDE, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([0.7]),
        "return_dict": False,
    }
    if ids:
        inputs |= {"img_ids": grid(), "txt_ids": torch.zeros(TEXT, 3)}
    return inputs | more


_SIZES = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}


@diffusers_case("FluxTransformer2DModel", **_SIZES, pooled_projection_dim=16, guidance_embeds=True)
def flux() -> Inputs:
    return _packed(pooled_projections=randn(1, 16), guidance=torch.tensor([3.5]))


@diffusers_case(
    "Flux2Transformer2DModel",
    **{**_SIZES, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
)
def flux2() -> Inputs:
    return _packed(img_ids=grid(axes=4), txt_ids=torch.zeros(TEXT, 4), guidance=torch.tensor([3.5]))


@diffusers_case(
    "Flux3Transformer2DModel",
    **{**_SIZES, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 16, "cond_in_channels": 4},
)
def flux3() -> Inputs:
    return _packed(img_ids=grid(axes=4), txt_ids=torch.zeros(TEXT, 4))


@diffusers_case("BriaTransformer2DModel", **{**_SIZES, "axes_dims_rope": [4, 4, 8]})
def bria() -> Inputs:
    return _packed()


@diffusers_case(
    "BriaFiboTransformer2DModel", **{**_SIZES, "axes_dims_rope": [4, 4, 8]}, text_encoder_dim=12
)
def bria_fibo() -> Inputs:
    return _packed(text_encoder_layers=[randn(1, TEXT, 12) for _ in range(4)])


_CHROMA = {
    **_SIZES,
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}


@diffusers_case("ChromaTransformer2DModel", **_CHROMA)
def chroma() -> Inputs:
    return _packed()


@diffusers_case("ChromaTransformer2DModel/mask", **_CHROMA)
def chroma_mask() -> Inputs:
    mask = torch.cat([padded_text(), torch.ones(1, SIDE * SIDE, dtype=torch.bool)], dim=1)
    return _packed(attention_mask=mask)


@diffusers_case(
    "LongCatImageTransformer2DModel",
    **{**_SIZES, "axes_dims_rope": [4, 4, 8], "pooled_projection_dim": 16},
)
def longcat_image() -> Inputs:
    return _packed()


@diffusers_case("OvisImageTransformer2DModel", **_SIZES, out_channels=4)
def ovis() -> Inputs:
    return _packed()


_NO_SINGLE = {name: value for name, value in _SIZES.items() if name != "num_single_layers"}


@diffusers_case("QwenImageTransformer2DModel", **_NO_SINGLE, out_channels=4, patch_size=1)
def qwen_image() -> Inputs:
    return _packed(ids=False, img_shapes=[[(1, SIDE, SIDE)]])


@diffusers_case("QwenImageTransformer2DModel/mask", **_NO_SINGLE, out_channels=4, patch_size=1)
def qwen_image_mask() -> Inputs:
    # Text comes first in the joint sequence, so its padding is a hole in the middle.
    return {
        "hidden_states": randn(2, SIDE * SIDE, 4),
        "encoder_hidden_states": randn(2, TEXT, 24),
        "encoder_hidden_states_mask": padded_text(30, 7),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_shapes": [[(1, SIDE, SIDE)]] * 2,
        "return_dict": False,
    }


@diffusers_case(
    "NucleusMoEImageTransformer2DModel",
    **_NO_SINGLE,
    out_channels=4,
    patch_size=1,
    num_experts=4,
    moe_intermediate_dim=16,
    mlp_ratio=8.0,
    dense_moe_strategy="leave_first_block_dense",
    capacity_factors=2.0,
)
def nucleus() -> Inputs:
    return _packed(
        ids=False, img_shapes=[(1, SIDE, SIDE)], encoder_hidden_states_mask=padded_text()
    )


@diffusers_case(
    "Krea2Transformer2DModel",
    in_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    timestep_embed_dim=16,
    text_hidden_dim=32,
    num_text_layers=2,
    text_num_attention_heads=2,
    text_num_key_value_heads=2,
    text_intermediate_size=32,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
    axes_dims_rope=(4, 4, 8),
)
def krea2() -> Inputs:
    return {
        "hidden_states": randn(1, SIDE * SIDE, 4),
        "encoder_hidden_states": randn(1, TEXT, 2, 32),
        "timestep": torch.tensor([0.7]),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid()]),
        "encoder_attention_mask": padded_text(),
        "return_dict": False,
    }


@diffusers_case(
    "Ideogram4Transformer2DModel",
    in_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    intermediate_size=48,
    adaln_dim=16,
    llm_features_dim=24,
    mrope_section=(2, 3, 2),
)
def ideogram4() -> Inputs:
    from diffusers.models.transformers import transformer_ideogram4 as source

    tokens = TEXT + SIDE * SIDE
    indicator = torch.full((1, tokens), source.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :TEXT] = source.LLM_TOKEN_INDICATOR
    return {
        "hidden_states": randn(1, tokens, 4),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, tokens, 24),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid()])[None].long(),
        "segment_ids": torch.zeros(1, tokens, dtype=torch.long),
        "indicator": indicator,
        "return_dict": False,
    }


@diffusers_case(
    "HiDreamImageTransformer2DModel",
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    caption_channels=[24, 20],
    text_emb_dim=16,
    num_routed_experts=2,
    num_activated_experts=1,
    axes_dims_rope=(4, 6, 6),
    max_resolution=(16, 16),
    llama_layers=[0, 1],
    force_inference_output=True,
)
def hidream() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "timesteps": torch.tensor([700]),
        "encoder_hidden_states_t5": randn(1, TEXT, 24),
        "encoder_hidden_states_llama3": randn(2, 1, TEXT, 20),
        "pooled_embeds": randn(1, 16),
        "return_dict": False,
    }
