"""Names of traced modules, as a user knows them."""

from __future__ import annotations

from torch import nn

from ..passes import Decision


class ModuleNames:
    """What the modules of a model are called in `model.named_modules()`.

    A trace knows a module by a path that depends on where the trace began, and by its identity.
    Without a model, the path is all there is.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = () if model is None else model.named_modules()
        self._by_identity = {str(id(module)): name for name, module in modules}

    def of(self, decision: Decision) -> str:
        """The name of the innermost module around a site, "" outside of all modules."""
        name = decision.module
        if decision.modules:
            identity, _ = decision.modules[-1]
            name = self._by_identity.get(identity, name)
        return name.removeprefix("_orig_mod.")
