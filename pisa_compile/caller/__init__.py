"""Read the grid of the tokens from the model that is being called.

A graph does not always show it: FLUX takes its image as packed tokens, and a transformer block that
is compiled alone sees tokens only. But when a compiled graph runs, the calls of the modules around
it are on the Python stack, with their arguments.
"""

from .module import traced_module as traced_module
from .stack import tokens_of_caller as tokens_of_caller
