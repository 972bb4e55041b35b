"""Tiny, fully random configurations of diffusion transformers, to trace and to compare.

Everything from a model library is imported when a case is built, never here.
"""

# Importing these registers their cases.
from . import audio as audio
from . import flux_like as flux_like
from . import image as image
from . import image_text as image_text
from . import packed as packed
from . import plain as plain
from . import video as video
from . import video_joint as video_joint
from .batch import register_batches
from .case import CASES as CASES
from .case import Case as Case
from .case import diffusers_classes as diffusers_classes
from .case import outputs as outputs

register_batches()
