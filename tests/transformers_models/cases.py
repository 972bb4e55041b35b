"""Encoders of transformers, tiny, with random weights, and what is to become of their attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 24
BIAS = "relative positions or ALiBi"
QUERIES = "varies over queries"

Inputs = dict[str, Tensor]


def text(*, padded: bool) -> Inputs:
    """Token ids [2, T]; the first text is shorter than the second."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    mask[1, 21:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


def picture(*, padded: bool) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def sound(*, padded: bool) -> Inputs:
    samples = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1600, dtype=torch.long)
    mask[0, 900:] = 0
    given = {"input_values": samples}
    return given | {"attention_mask": mask} if padded else given


def spectrum(*, padded: bool) -> Inputs:
    return {"input_features": torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        module: of `transformers.models`, with the names of model and configuration in it.
        inputs: makes those of a call.
        settings: arguments of the configuration.
        replaced: sites that are replaced, without and with padding.
        reasons: parts of the reasons why others are not, without and with padding.
        written_out: whether the library has it without `F.scaled_dot_product_attention` alone.
        pads: whether its inputs can be padded.
    """

    module: str
    model: str
    configuration: str
    inputs: Callable[..., Inputs]
    settings: dict[str, Any] = field(default_factory=dict)
    replaced: tuple[int, int] = (2, 2)
    reasons: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    written_out: bool = False
    pads: bool = True

    def build(self, attention: str) -> nn.Module:
        """The model with `attention`, "sdpa" or "eager"."""
        place = importlib.import_module(f"transformers.models.{self.module}")
        try:
            cls = getattr(place, self.model)
        except AttributeError:  # encoders that are no model of their own
            name = f"transformers.models.{self.module}.modeling_{self.module}"
            cls = getattr(importlib.import_module(name), self.model)
        torch.manual_seed(0)
        configuration = getattr(place, self.configuration)
        model: nn.Module = cls(configuration(**self.settings, attn_implementation=attention))
        return model.eval().requires_grad_(False)


_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
_SEQUENCE = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
}

CASES: dict[str, Case] = {
    "BERT": Case("bert", "BertModel", "BertConfig", text, _TEXT),
    "RoBERTa": Case("roberta", "RobertaModel", "RobertaConfig", text, _TEXT),
    "XLM-RoBERTa": Case("xlm_roberta", "XLMRobertaModel", "XLMRobertaConfig", text, _TEXT),
    "CamemBERT": Case("camembert", "CamembertModel", "CamembertConfig", text, _TEXT),
    # Every other layer has a window, shorter than the sequence.
    "ModernBERT": Case(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        text,
        _TEXT
        | _SPECIAL
        | {
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
        },
        replaced=(1, 1),
        reasons=((QUERIES,), (QUERIES,)),
    ),
    "ModernBERT, long window": Case(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        text,
        _TEXT
        | _SPECIAL
        | {
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 128,
        },
    ),
    "DistilBERT": Case(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        text,
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "ELECTRA": Case(
        "electra", "ElectraModel", "ElectraConfig", text, _TEXT | {"embedding_size": 32}
    ),
    "ALBERT": Case("albert", "AlbertModel", "AlbertConfig", text, _TEXT | {"embedding_size": 16}),
    "ESM": Case(
        "esm",
        "EsmModel",
        "EsmConfig",
        text,
        _TEXT | {"pad_token_id": 0, "mask_token_id": 1, "position_embedding_type": "rotary"},
    ),
    "NomicBERT": Case("nomic_bert", "NomicBertModel", "NomicBertConfig", text, _TEXT),
    "EuroBERT": Case("eurobert", "EuroBertModel", "EuroBertConfig", text, _TEXT | _SPECIAL),
    "BART's encoder": Case("bart", "BartEncoder", "BartConfig", text, _SEQUENCE),
    "SigLIP, text": Case("siglip", "SiglipTextModel", "SiglipTextConfig", text, _TEXT),
    # Padding of numbers that may be any integers is no mask that can be proven to be one.
    "LayoutLM": Case(
        "layoutlm",
        "LayoutLMModel",
        "LayoutLMConfig",
        text,
        _TEXT,
        replaced=(2, 0),
        reasons=((), ("not provably made of 0 and -inf",)),
    ),
    "RemBERT": Case(
        "rembert",
        "RemBertModel",
        "RemBertConfig",
        text,
        _TEXT | {"input_embedding_size": 16},
        written_out=True,
    ),
    # The outer product of padding with itself, in integers.
    "DeBERTa without relative positions": Case(
        "deberta",
        "DebertaModel",
        "DebertaConfig",
        text,
        _TEXT | {"relative_attention": False},
        replaced=(2, 0),
        reasons=((), (QUERIES,)),
        written_out=True,
    ),
    "DeBERTa-v2": Case(
        "deberta_v2",
        "DebertaV2Model",
        "DebertaV2Config",
        text,
        _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        replaced=(0, 0),
        reasons=((BIAS,), (BIAS,)),
        written_out=True,
    ),
    "MPNet": Case(
        "mpnet",
        "MPNetModel",
        "MPNetConfig",
        text,
        _TEXT,
        replaced=(0, 0),
        reasons=((BIAS,), (BIAS,)),
        written_out=True,
    ),
    "T5's encoder": Case(
        "t5",
        "T5EncoderModel",
        "T5Config",
        text,
        {"vocab_size": 99, "d_model": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64},
        replaced=(0, 0),
        reasons=((BIAS,), (BIAS,)),
    ),
    "CLIP, text": Case(
        "clip",
        "CLIPTextModel",
        "CLIPTextConfig",
        text,
        _TEXT | _SPECIAL,
        replaced=(0, 0),
        reasons=(("causal", QUERIES), (QUERIES,)),
    ),
    "CLIP, vision": Case(
        "clip", "CLIPVisionModel", "CLIPVisionConfig", picture, _VISION, pads=False
    ),
    # One query of its own pools the tokens in the end.
    "SigLIP, vision": Case(
        "siglip",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        picture,
        _VISION,
        reasons=(("cross-attention",), ()),
        pads=False,
    ),
    "ViT": Case("vit", "ViTModel", "ViTConfig", picture, _VISION, pads=False),
    "BEiT": Case("beit", "BeitModel", "BeitConfig", picture, _VISION, pads=False),
    "DINOv2": Case(
        "dinov2", "Dinov2Model", "Dinov2Config", picture, _VISION | {"mlp_ratio": 2}, pads=False
    ),
    "Whisper's encoder": Case(
        "whisper",
        "WhisperEncoder",
        "WhisperConfig",
        spectrum,
        _SEQUENCE | {"num_mel_bins": 16, "max_source_positions": 30},
        pads=False,
    ),
    "wav2vec 2.0": Case("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", sound, _SPEECH),
    "HuBERT": Case("hubert", "HubertModel", "HubertConfig", sound, _SPEECH),
}
