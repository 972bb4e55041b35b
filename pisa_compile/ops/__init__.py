"""`torch.ops.pisa.*`: schema, checks, FLOPs, `pisa.attention`, and who may watch its calls.

Importing this room registers the ops.
"""

from . import register as register
from . import token_order as token_order
