"""Reads a compiled program's text (HLO): copies of large arrays, kernels that a GPU launches, and products.

A program is a list of computations, each a list of instructions; fusions, loops and conditions call computations:

    %fused_computation (p: f32[8,4]) -> f32[4,8] {
      %p = f32[8,4]{1,0} parameter(0)
      ROOT %t = f32[4,8]{1,0} transpose(%p), dimensions={1,0}
    }
    ENTRY %main (x: f32[8,4]) -> f32[4,8] {
      %x = f32[8,4]{1,0} parameter(0)
      ROOT %f = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation
    }
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# An instruction's type is one array, or a tuple in parentheses (with comments such as /*index=5*/ in it).
INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
MEMORY_SPACE = re.compile(r"S\((\d+)\)")

ON_CHIP = "1"  # a TPU's vector memory

FETCHES = {"copy", "copy-start", "copy-done"}  # copies of the operand into another memory space
MOVES = {"copy", "copy-start", "transpose"}
PRODUCTS = {"dot", "convolution"}  # a TPU's are convolutions
SAME_BYTES = {"bitcast", "reshape", "get-tuple-element"}  # operations that a copy may be wrapped in
# Operations that launch no kernel on a GPU.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("copy-done", "async-start", "async-update", "async-done", "all-reduce-done", "all-gather-done"),
}


class Instruction(NamedTuple):
    """type: as written, "bf16[8,4]{1,0}" or a tuple's. rest: operands (without the parenthesis) and attributes."""

    name: str
    type: str
    opcode: str
    rest: str
    root: bool

    @property
    def array(self) -> str:
        """Its array, or a tuple's first one, without a layout: "bf16[8,4]"."""
        found = ARRAY.search(self.type)
        return f"{found[1]}[{found[2]}]" if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        branches = BRANCHES.search(self.rest)
        listed = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return CALLED.findall(self.rest) + listed


class Program(NamedTuple):
    """computations: {name: instructions}. entry: the name of the first to run."""

    computations: dict[str, list[Instruction]]
    entry: str


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Parses the computations of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(found[2], found[3], found[4], found[5], bool(found[1])))
    return Program(computations, entry)


def large_copies(text: str, at_least: int = 2**20, *, in_loops: bool = False) -> list[str]:
    """Finds arrays of `at_least` elements that a program copies unchanged, such as weights and whole caches.

    Counted are copies and transposes from memory into memory, and fusions that do nothing else. Not counted are those
    inside a fusion that computes (their result never reaches memory), and on a TPU those into or out of on-chip memory
    (prefetches from HBM).

    Args:
      in_loops: count only what loops repeat, not what runs once before or after them.
    Returns:
      Their types, such as "bf16[8,4096]", once for each instruction.
    """
    program = parse(text)
    copies = []
    for name in _run(program, in_loops):
        made_by = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in program.computations[name]:
            if elements(instruction.type) < at_least or not _moves(program, instruction):
                continue
            source = made_by.get(instruction.operands[0]) if instruction.operands else None
            while source is not None and source.opcode in FETCHES:
                source = made_by.get(source.operands[0])
            if not _on_chip(instruction) and not _on_chip(source):
                copies.append(instruction.array)
    return copies


def elements(type_: str) -> int:
    """Counts the elements of an array type, or of a tuple's first array: 32 for "bf16[8,4]"."""
    found = ARRAY.search(type_)
    return math.prod(int(size) for size in found[2].split(",") if size) if found else 0


def kernels(text: str, branch: Callable[[list[int]], int] = max) -> int:
    """Counts the kernels that a GPU launches in one run of a program: fusions, library calls, sorts, copies.

    A loop counts as often as its known trip count says, else once (its condition too). Of a conditional's branches the
    one with the most kernels counts, or with branch=min the one with the fewest.
    """
    program = parse(text)

    @functools.cache
    def launches(name: str) -> int:
        return sum(of(instruction) for instruction in program.computations[name])

    def of(instruction: Instruction) -> int:
        if instruction.opcode == "while":
            trips = TRIPS.search(instruction.rest)
            condition, body = (re.search(rf"{part}=%?([\w.\-]+)", instruction.rest) for part in ("condition", "body"))
            assert condition and body
            return int(trips[1]) * launches(body[1]) if trips else launches(body[1]) + launches(condition[1])
        if instruction.opcode == "conditional":
            return branch([launches(name) for name in instruction.called])
        if instruction.opcode == "call":
            return sum(launches(name) for name in instruction.called)
        return 0 if instruction.opcode in FREE else 1

    return launches(program.entry)


def products(text: str) -> dict[str, int]:
    """Counts the matrix products of one run of a program by the type of their result, such as "bf16[64,14336]".

    Those in fusions count, too. A loop counts as often as its known trip count says, else once.
    """
    program = parse(text)

    @functools.cache
    def of(name: str) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for instruction in program.computations[name]:
            trips = TRIPS.search(instruction.rest) if instruction.opcode == "while" else None
            for called in instruction.called:
                found.update({array: count * int(trips[1] if trips else 1) for array, count in of(called).items()})
            found[instruction.array] += instruction.opcode in PRODUCTS
        return +found

    return dict(of(program.entry))


def _run(program: Program, in_loops: bool) -> list[str]:
    """Returns the computations whose results are in memory: the entry, loops, branches; no fusions."""
    found: dict[str, bool] = {}  # name -> whether a loop repeats it
    todo = [(program.entry, False)]
    while todo:
        name, repeated = todo.pop()
        if found.get(name, False) or (name in found and not repeated):
            continue
        found[name] = repeated
        for instruction in program.computations[name]:
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                todo += [(called, repeated or instruction.opcode == "while") for called in instruction.called]
    return [name for name, repeated in found.items() if repeated or not in_loops]


def _moves(program: Program, instruction: Instruction) -> bool:
    """Returns whether it is a copy or transpose, or a fusion that only copies or transposes an operand."""
    if instruction.opcode in MOVES:
        return True
    if instruction.opcode != "fusion":
        return False
    body = {inner.name: inner for inner in program.computations[instruction.called[0]]}
    inner, moved = next(inner for inner in body.values() if inner.root), False
    while inner.opcode in MOVES | SAME_BYTES:
        moved |= inner.opcode in MOVES
        inner = body[inner.operands[0]]
    return moved and inner.opcode == "parameter"


def _on_chip(instruction: Instruction | None) -> bool:
    """Returns whether its array, or a tuple's first one, lies in a TPU's on-chip memory."""
    array = ARRAY.search(instruction.type) if instruction else None
    space = MEMORY_SPACE.search(array[0]) if array else None
    return space is not None and space[1] == ON_CHIP
