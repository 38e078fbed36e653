"""Facts that a compiler states of programs of the 8B pair, extrapolated over the number of layers.

An H200's programs are compiled with 2 and with 4 layers of the target. The difference is the cost of a layer: sharper
than a total of 32 layers, in an eighth of the time. A TPU's compiler takes as long for 2 layers as for 4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bench.aot import compilers, hlo
from bench.aot.programs import Program
from bench.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".pytest_cache" / "compiled"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
FEW, MORE, ALL = 2, 4, 32

# What a program may hold, by a part of its text.
HELD = {"callback": "callback", "flash forward": "mha_forward", "flash backward": "mha_backward"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Bytes a chip; kernels that a GPU launches in a run; types of the copied weights and caches; names of HELD.

    arrays: all types of two dimensions or more, such as "4,2048,32000". products: see `hlo.products`.
    """

    arguments: int
    temporaries: int
    aliased: int
    peak: int
    kernels: int
    copies: list[str]
    held: list[str]
    arrays: list[str]
    products: dict[str, int]


def facts(program: Program, device: Any) -> Facts:
    """Compiles a program, or reads the stored facts if the same compiler compiled it before."""
    lowered = program.lower(device)
    path = KEPT / f"{_digest(program, lowered, device)}.json"
    if path.exists():
        return Facts(**json.loads(path.read_text()))
    compiled = compilers.compile_lowered(lowered)
    text, memory, kept = compilers.text(compiled), compilers.Memory.of(compiled), compiled.memory_analysis()
    found = Facts(
        memory.arguments,
        memory.temporaries,
        kept.alias_size_in_bytes,
        memory.peak,
        hlo.kernels(text),
        program.copies(compiled, device),
        [name for name, part in HELD.items() if part in text],
        sorted({shape for _, shape, _ in hlo.ARRAY.findall(text) if "," in shape}),
        hlo.products(text),
    )
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=KEPT, delete=False) as file:
        json.dump(dataclasses.asdict(found), file)
    Path(file.name).replace(path)
    return found


def _digest(program: Program, lowered: jax.stages.Lowered, device: Any) -> str:
    """Of the program, of its compiler, and of the code that reads what the compiler made."""
    chip = device.devices.flat[0] if isinstance(device, Mesh) else device
    shapes = [str(leaf) for leaf in jax.tree.leaves(program.placed(device))]
    versions = sorted(
        f"{each.name} {each.version}" for each in importlib.metadata.distributions() if each.name in PACKAGES
    )
    digest = hashlib.sha256(json.dumps([shapes, versions, chip.platform, chip.device_kind]).encode())
    digest.update(lowered.as_text().encode())
    sources = (
        Path(__file__),
        compilers.H200,
        *(ROOT / "bench" / "aot" / name for name in ("compilers.py", "hlo.py", "programs.py")),
    )
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def shape(layers: int) -> Shape:
    """Llama-3.1-8B and its head, with so many layers in the target."""
    return SHAPES["8b"].with_layers(layers)


def extended(few: float, more: float) -> float:
    """What it comes to at ALL layers if it grows by layers as from FEW to MORE."""
    return few + (more - few) * (ALL - FEW) / (MORE - FEW)


def caches(program: Program) -> tuple[int, int]:
    """Bytes of the target's cache, and of both caches, of a program that takes or makes a DecodeState."""
    state = program.made or program.args[2]
    target, both = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held) if x.ndim == 4)
        for held in (state.cache, (state.cache, state.memory))
    )
    return target, both
