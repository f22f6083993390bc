"""Between flax modules and parameter trees: the hot path is a pure function of a tree.

A parameter tree is a nested dict of arrays; list entries are int keys. "a/0/b" is the path of
`tree["a"][0]["b"]` and of a `WeightSpec`.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from semipd_jax.models.registry import family_of
from semipd_jax.models.spec import ModelSpec

type Params = dict[Any, Any]


def abstract_params(spec: ModelSpec, dtype: DTypeLike) -> tuple[nnx.GraphDef, Params]:
    """The module's structure and a tree of `jax.ShapeDtypeStruct`; allocates nothing."""
    module_name, class_name = family_of(spec.architecture).module.split(":")
    module = getattr(importlib.import_module(module_name), class_name)
    abstract = nnx.eval_shape(lambda: module(spec.config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module over these arrays. Costs milliseconds: call it while tracing, not per step."""
    return nnx.merge(graphdef, params)


def nest(leaves: Mapping[str, Any]) -> Params:
    """Path → leaf, as a parameter tree."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flatten(params: Params) -> dict[str, Any]:
    """The inverse of `nest`."""
    leaves: dict[str, Any] = {}

    def visit(node: Params, prefix: str) -> None:
        for key, child in node.items():
            if isinstance(child, dict):
                visit(child, f"{prefix}{key}/")
            else:
                leaves[f"{prefix}{key}"] = child

    visit(params, "")
    return leaves
