"""Audio transformers on [B, T, C] or [B, C, T]."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, padded_text


@diffusers_case(
    "AceStepTransformer1DModel",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    in_channels=12,
    audio_acoustic_hidden_dim=4,
    sliding_window=64,
)
def ace_step() -> Inputs:
    return {
        "hidden_states": randn(1, 512, 4),
        "timestep": torch.tensor([0.7]),
        "timestep_r": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, TEXT, 32),
        "context_latents": randn(1, 512, 8),
        "return_dict": False,
    }


@diffusers_case(
    "StableAudioDiTModel",
    sample_size=300,
    in_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    num_key_value_attention_heads=1,
    out_channels=4,
    cross_attention_dim=24,
    time_proj_dim=16,
    global_states_input_dim=20,
    cross_attention_input_dim=24,
)
def stable_audio() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 300),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "global_hidden_states": randn(1, 1, 20),
        "rotary_embedding": (randn(301, 8), randn(301, 8)),
        "return_dict": False,
    }


@diffusers_case(
    "StableAudio3DiTModel",
    io_channels=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    cond_token_dim=24,
    global_cond_dim=20,
    local_add_cond_dim=3,
    timestep_features_dim=16,
    num_memory_tokens=8,
)
def stable_audio3() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 300),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "global_hidden_states": randn(1, 20),
        "encoder_attention_mask": padded_text(),
        "local_add_cond": randn(1, 3, 300),
        "return_dict": False,
    }


@diffusers_case(
    "LongCatAudioDiTTransformer",
    dit_dim=32,
    dit_depth=2,
    dit_heads=2,
    dit_text_dim=24,
    latent_dim=4,
    ff_mult=2.0,
)
def longcat_audio() -> Inputs:
    return {
        "hidden_states": randn(1, 300, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "encoder_attention_mask": padded_text(),
        "timestep": torch.tensor([0.7]),
        "attention_mask": (torch.arange(300) < 280)[None],
        "latent_cond": randn(1, 300, 4),
        "return_dict": False,
    }


@diffusers_case(
    "MiniMaxMusic3Transformer1DModel",
    in_channels=4,
    condition_dim=8,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    ff_inner_dim=48,
    rotary_dim=8,
    fourier_embedding_dim=16,
)
def minimax_music3() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 300),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, 300, 8),
        "return_dict": False,
    }


@diffusers_case(
    "MiniMaxMusic3RVQDepthDecoder",
    hidden_size=32,
    num_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    audio_vocab_size=32,
    num_codebooks=4,
    max_position_embeddings=16,
)
def minimax_depth_decoder() -> Inputs:
    return {"inputs_embeds": randn(1, 8, 32)}


@diffusers_case(
    "T5FilmDecoder",
    input_dims=8,
    targets_length=256,
    d_model=32,
    num_layers=2,
    num_heads=2,
    d_kv=16,
    d_ff=48,
)
def t5_film() -> Inputs:
    return {
        "encodings_and_masks": [(randn(1, TEXT, 32), torch.ones(1, TEXT))],
        "decoder_input_tokens": randn(1, 256, 8),
        "decoder_noise_time": torch.tensor([0.7]),
    }
