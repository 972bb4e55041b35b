"""Attention written out: softmax(query @ key^T * scale + mask) @ value, in any spelling.

`softmax` finds where one may be, `path` what leads from the product of query and key to it and on
to the product with the values. `chain`, `scores` and `weights` prove what happens on that way,
`layout` reads from the axes how the tensors lie, `interior` whether all of it can go, and `matcher`
puts it together.
"""

from .matcher import HandWrittenAttention as HandWrittenAttention
