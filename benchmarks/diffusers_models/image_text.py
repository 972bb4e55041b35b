"""Image transformers on latents [B, C, H, W] whose text joins the sequence or is refined first."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, padded_text
from .image import latent_image


@diffusers_case(
    "LuminaNextDiT2DModel",
    sample_size=32,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=16,
    cross_attention_dim=24,
)
def lumina() -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return latent_image(
        timestep=torch.tensor([0.7]),
        encoder_mask=padded_text(),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, 16, 16),
        cross_attention_kwargs={},
    )


@diffusers_case(
    "Lumina2Transformer2DModel",
    sample_size=32,
    in_channels=4,
    hidden_size=32,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=16,
    axes_dim_rope=(4, 6, 6),
    axes_lens=(64, 32, 32),
    cap_feat_dim=24,
)
def lumina2() -> Inputs:
    return latent_image(timestep=torch.tensor([0.7]), encoder_attention_mask=padded_text())


@diffusers_case(
    "OmniGenTransformer2DModel",
    in_channels=4,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    num_layers=2,
    pad_token_id=0,
    vocab_size=64,
    max_position_embeddings=1024,
    original_max_position_embeddings=1024,
    rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    pos_embed_max_size=32,
    time_step_dim=16,
)
def omnigen() -> Inputs:
    tokens = TEXT + 1 + 256
    causal_text = torch.ones(1, tokens, tokens)
    causal_text[:, :TEXT] = torch.tril(causal_text[:, :TEXT])
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "timestep": torch.tensor([0.7]),
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": causal_text,
        "position_ids": torch.arange(tokens)[None],
        "return_dict": False,
    }


@diffusers_case(
    "PRXTransformer2DModel",
    in_channels=4,
    context_in_dim=24,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    axes_dim=[8, 8],
)
def prx() -> Inputs:
    return latent_image(timestep=torch.tensor([0.7]), attention_mask=padded_text())


@diffusers_case(
    "ZImageTransformer2DModel",
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=24,
    axes_dims=[4, 6, 6],
    axes_lens=[512, 32, 32],
)
def z_image() -> Inputs:
    return {
        "x": [randn(4, 1, 32, 32)],
        "t": torch.tensor([0.7]),
        "cap_feats": [randn(TEXT, 24)],
        "return_dict": False,
    }


@diffusers_case(
    "ErnieImageTransformer2DModel",
    hidden_size=32,
    num_attention_heads=2,
    num_layers=2,
    ffn_hidden_size=48,
    in_channels=4,
    out_channels=4,
    text_in_dim=24,
    rope_axes_dim=(4, 6, 6),
)
def ernie_image() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "text_bth": randn(1, TEXT, 24),
        "text_lens": torch.tensor([30]),
        "return_dict": False,
    }


@diffusers_case(
    "HunyuanImageTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=24,
    rope_axes_dim=(8, 8),
)
def hunyuan_image() -> Inputs:
    return latent_image(side=16, encoder_attention_mask=padded_text(dtype=torch.int64))


@diffusers_case(
    "BriaFibo2Transformer2DModel",
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=24,
    injection_layer_ids=(1,),
    perceiver_num_layers=1,
    min_num_gist_tokens=16,
    max_num_gist_tokens=32,
    gist_step=16,
    gist_min_text_len=16,
    gist_max_text_len=64,
    axes_dims=(4, 6, 6),
    axes_lens=(512, 64, 64),
)
def bria_fibo2() -> Inputs:
    return latent_image(
        timestep=torch.tensor([0.7]),
        encoder_hidden_states=randn(1, 2, TEXT, 24),
        encoder_attention_mask=padded_text(),
    )
