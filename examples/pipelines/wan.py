"""A video from Wan 2.1 with piecewise sparse attention.

    python -m examples.pipelines.wan "a cat walks on the grass" --output out/cat.mp4
    python -m examples.pipelines.wan --model 14B --height 720 --width 1280
    python -m examples.pipelines.wan --tiny

Self-attention over the video becomes sparse; cross-attention to the text stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .shared import arguments, compile_transformer, generate, place
from .tiny import TINY

CHECKPOINTS = {
    "1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "wan.mp4", steps=50)
    parser.add_argument("--model", choices=CHECKPOINTS, default="1.3B")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--guidance", type=float, default=5.0)
    args = parser.parse_args(argv)

    from diffusers.utils import export_to_video

    pipe = load(args.tiny, CHECKPOINTS[args.model])
    place(pipe, args)
    compile_transformer(pipe, args, first_block="blocks.0")
    result = generate(
        pipe,
        args,
        "WanPipeline",
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        guidance_scale=args.guidance,
    )
    print(export_to_video(result.frames[0], str(args.output), fps=16))


def load(tiny: bool, checkpoint: str) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    if tiny:
        return TINY["WanPipeline"].build()
    # The autoencoder loses quality in 16 bits.
    vae = AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(checkpoint, vae=vae, torch_dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
