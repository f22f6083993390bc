"""Proof that a compiled step updates shared arrays in place and touches only its own slots.

A program that copies a shared array, or rewrites more of it than its own slots, undoes what another
process writes meanwhile, even if XLA aliases the result with the argument. Sizes of temporaries do
not tell: a small pool is smaller than a step's activations, and a rewrite in place needs none. So
the optimised program itself is read: whatever has the shape of a shared array must be the argument,
passed along, or the result of an instruction that writes a bounded number of elements into it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import jax

from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.manifest import SharingError

type _Shape = tuple[str, str]
"""XLA's name of a dtype, and dimensions as XLA prints them."""

_PASSED_ALONG: Final = frozenset(
    ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "fusion")
)
"""Their results are their operands, or results of computations that are checked themselves."""

_UPDATE_OPERAND: Final = {"scatter": 2, "dynamic-update-slice": 1}
"""Instructions that update their first operand in place, and where the new elements are."""

_DTYPES: Final = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "s32"}
_INSTRUCTION: Final = re.compile(r"\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)")
_SHAPE: Final = re.compile(r"(\w+)\[([\d,]*)\]")
_ALIASED_RESULT: Final = re.compile(r"\{(\d*)\}: \(")
_OPERAND: Final = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True, slots=True)
class _Instruction:
    text: str
    name: str
    shapes: tuple[_Shape, ...]
    opcode: str
    operands: str


def check_in_place(compiled: jax.stages.Compiled, state: SharedState, num_tokens: int) -> None:
    """Raises SharingError unless a step of `num_tokens` tokens updates `state` in place.

    Args:
      compiled: a program that donates `state`.
      state: arrays or `jax.ShapeDtypeStruct`s.
    """
    shared = jax.tree.leaves(state)
    wanted = sum(math.prod(a.shape) * a.dtype.itemsize for a in shared)
    stats: Any = compiled.memory_analysis()
    if stats.alias_size_in_bytes < wanted:
        raise SharingError(
            f"only {stats.alias_size_in_bytes} of {wanted} shared bytes are updated in place"
        )
    text = compiled.as_text()
    if text is None:
        raise SharingError("the compiled program cannot be read, so sharing cannot be checked")
    per_token = {_shape(a): _slot_size(a) for layer in state.layers for a in layer.values()}
    per_token[_shape(state.tokens)] = 1
    check_instructions(text, {shape: n * num_tokens for shape, n in per_token.items()})


def check_instructions(text: str, most_written: dict[_Shape, int]) -> None:
    """Raises SharingError if an instruction rewrites or copies an array of one of the shapes.

    Args:
      text: an optimised HLO module.
      most_written: shape → elements that one instruction may write.
    """
    instructions = list(_parse(text))
    shapes = {i.name: i.shapes for i in instructions}
    most_written = most_written | _other_views(instructions, most_written, shapes)
    for instruction in instructions:
        for shape in most_written.keys() & set(instruction.shapes):
            if not _is_allowed(instruction, shape, shapes, most_written[shape]):
                raise SharingError(
                    f"the program rewrites a shared array: {instruction.text.strip()[:200]}"
                )


def _is_allowed(
    instruction: _Instruction,
    shape: _Shape,
    shapes: dict[str, tuple[_Shape, ...]],
    most_written: int,
) -> bool:
    """Whether an instruction with a result of the shared `shape` may be in the program."""
    if instruction.opcode in _PASSED_ALONG:
        return True
    if instruction.opcode == "custom-call":
        return _is_aliased(instruction, shape)
    if instruction.opcode not in _UPDATE_OPERAND:
        return False
    operands = _OPERAND.findall(instruction.operands)
    updates = shapes[operands[_UPDATE_OPERAND[instruction.opcode]]]
    return all(_num_elements(dims) <= most_written for _, dims in updates)


def _is_aliased(kernel: _Instruction, shape: _Shape) -> bool:
    """Every result of that shape is an operand. What the kernel writes there cannot be seen."""
    aliasing = kernel.operands.partition("output_to_operand_aliasing=")[2].partition(")}")[0]
    aliased = {int(index or 0) for index in _ALIASED_RESULT.findall(aliasing)}
    return aliased.issuperset(i for i, result in enumerate(kernel.shapes) if result == shape)


def _other_views(
    instructions: list[_Instruction],
    most_written: dict[_Shape, int],
    shapes: dict[str, tuple[_Shape, ...]],
) -> dict[_Shape, int]:
    """Shapes under which the program also sees the shared arrays: by bitcast. Same limit."""
    return {
        view: most_written[source]
        for instruction in instructions
        if instruction.opcode == "bitcast"
        for view in instruction.shapes
        for source in shapes.get(_OPERAND.findall(instruction.operands)[0], ())
        if source in most_written
    }


def _parse(text: str) -> Iterator[_Instruction]:
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name, result, opcode, operands = match.groups()
            yield _Instruction(line, name, tuple(_SHAPE.findall(result)), opcode, operands)


def _shape(array: Any) -> _Shape:
    return _DTYPES[array.dtype.name], ",".join(map(str, array.shape))


def _slot_size(kv_array: Any) -> int:
    """Elements that one token has in a KV array; the last axis but one counts tokens of a page."""
    *outer, _, width = kv_array.shape[1:]
    return math.prod(outer) * width


def _num_elements(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)
