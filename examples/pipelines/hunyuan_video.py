"""A video from HunyuanVideo with piecewise sparse attention.

    python -m examples.pipelines.hunyuan_video "a cat walks on the grass" --output out/cat.mp4
    python -m examples.pipelines.hunyuan_video --height 720 --width 1280 --frames 129 --offload
    python -m examples.pipelines.hunyuan_video --tiny

Text and video attend each other in one sequence, whose padding is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .shared import arguments, compile_transformer, generate, place
from .tiny import TINY

CHECKPOINT = "hunyuanvideo-community/HunyuanVideo"


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "hunyuan_video.mp4", steps=30)
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--frames", type=int, default=61)
    parser.add_argument("--guidance", type=float, default=6.0)
    args = parser.parse_args(argv)

    from diffusers.utils import export_to_video

    pipe = load(args.tiny)
    place(pipe, args)
    compile_transformer(pipe, args, first_block="transformer_blocks.0")
    result = generate(
        pipe,
        args,
        "HunyuanVideoPipeline",
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        guidance_scale=args.guidance,
    )
    print(export_to_video(result.frames[0], str(args.output), fps=15))


def load(tiny: bool) -> Any:
    from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    if tiny:
        return TINY["HunyuanVideoPipeline"].build()
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(
        CHECKPOINT, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    pipe = HunyuanVideoPipeline.from_pretrained(
        CHECKPOINT, transformer=transformer, torch_dtype=torch.float16
    )
    pipe.vae.enable_tiling()
    return pipe


if __name__ == "__main__":
    main()
