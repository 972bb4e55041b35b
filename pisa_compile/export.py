"""`pisa.rewrite`: the rewrite for programs of `torch.export`, which no backend ever sees."""

from __future__ import annotations

import copy
import dataclasses

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument

from .passes import rewrite_attention
from .policies.policy import Policy
from .policies.presets import Presets


def rewrite(program: ExportedProgram, policy: Policy | None = None) -> ExportedProgram:
    """Replace the attention of an exported program by piecewise sparse attention.

        program = torch.export.export(model, (latents, timestep))
        torch.export.save(pisa.rewrite(program, pisa.Policy(sparsity=0.9)), "model.pt2")

    The result is meant for inference: sites are replaced whether or not parameters require
    gradients. Policies on the model's modules were recorded by the export and are followed. Whoever
    loads the program imports `pisa_compile` first, which registers the op.

    Args:
        program: stays as it is; the result shares its parameters.
        policy: for sites that no decorator or `set_policy` covers.

    Returns:
        A program that passes torch's own validation. Where nothing could be replaced it computes
        what `program` does; the "pisa_compile" logger says why at INFO level.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program must be a torch.export.ExportedProgram, got {type(program).__name__}; "
            "modules are compiled with torch.compile(model, backend='pisa')"
        )
    gm = copy.deepcopy(program.graph_module)
    _name_constants(program, gm.graph)
    rewrite_attention(gm, policy or Policy(), inference=True, presets=Presets())
    rewritten = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=_renamed(program.graph_signature, gm.graph),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    rewritten.validate()  # type: ignore[no-untyped-call]
    return rewritten


def _name_constants(program: ExportedProgram, graph: fx.Graph) -> None:
    """Leave tensors that the program itself holds at the inputs that stand for them."""
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR and spec.target in program.constants:
            inputs[spec.arg.name].meta["constant"] = program.constants[spec.target]


def _renamed(signature: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """The signature with the names that the outputs of the graph have now."""
    (output,) = graph.find_nodes(op="output")
    specs = []
    for spec, result in zip(signature.output_specs, output.args[0], strict=True):
        if isinstance(spec.arg, TensorArgument) and isinstance(result, fx.Node):
            spec = dataclasses.replace(spec, arg=TensorArgument(name=result.name))
        specs.append(spec)
    return ExportGraphSignature(list(signature.input_specs), specs)
