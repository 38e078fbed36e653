"""Compiles for absent accelerators: TPUs and an H200, with their real compilers, on a CPU machine.

It shows memory, donation, copies and kernel counts of the program that the accelerator would run, not times.
Needs the `aot` extra. `make test` unpacks it into `$VENV/aot` rather than installing it: JAX warns at each start about
the plugin of an absent accelerator. The process's own CPU device works as usual.

    find_compilers()
    device = gpu_devices()[0]
    compiled = compile_for(device, step, jax.ShapeDtypeStruct((8, 8), jnp.float32), donate_argnums=0)
    Memory.of(compiled), text(compiled)
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding

COMPILERS = Path(sys.prefix) / "aot"
CACHE_FROM = "jax_persistent_cache_min_compile_time_secs"
H200 = Path(__file__).parent / "h200_target_config.txt"
# libtpu reads these when it is loaded: ask no metadata server, write no logs, and share the machine with other
# processes (it would hold a lock file, which is for processes that use a real TPU).
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Flags to dump every program's HLO, and nothing else. libtpu ends the process at a flag that it does not know.
WRITE_HLO = "--xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false --xla_jf_dump_llo_pass_label_regex=none"
_written: weakref.WeakKeyDictionary[jax.stages.Compiled, Path] = weakref.WeakKeyDictionary()  # program -> its file


class CompilerMissing(Exception):
    """The compiler of an accelerator is not installed."""


class Memory(NamedTuple):
    """Bytes a chip: arguments (weights, state), temporaries, and the peak."""

    arguments: int
    temporaries: int
    peak: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Memory:
        """Reads the compiler's memory analysis of a program; donated arguments count once."""
        kept = compiled.memory_analysis()
        assert kept is not None
        peak = kept.argument_size_in_bytes + kept.temp_size_in_bytes + kept.output_size_in_bytes
        return cls(kept.argument_size_in_bytes, kept.temp_size_in_bytes, peak - kept.alias_size_in_bytes)


def find_compilers() -> None:
    """Puts `$VENV/aot` on the import path. Call it before JAX's first use of a device, when it looks for plugins."""
    if COMPILERS.is_dir() and str(COMPILERS) not in sys.path:
        sys.path.append(str(COMPILERS))


@functools.cache
def tpu_devices(topology: str = "v5e:2x2") -> list[Any]:
    """Returns the chips of a TPU topology. Raises CompilerMissing where libtpu is not installed."""
    _need("libtpu")
    import libtpu

    os.environ.update(LIBTPU | {"TPU_LIBRARY_PATH": libtpu.get_library_path(), "LIBTPU_INIT_ARGS": _libtpu_flags()})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


@functools.cache
def gpu_devices(count: int = 1) -> list[Any]:
    """Returns `count` H200 GPUs of one host. Raises CompilerMissing where the CUDA 13 compiler is not installed."""
    _need("jax_plugins.xla_cuda13")
    config = H200.read_text()
    return list(
        topologies.get_topology_desc("", platform="cuda", target_config=config, topology=f"1x{count}x1").devices
    )


def compile_for(
    device: Any,
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **static: Any,
) -> jax.stages.Compiled:
    """Compiles the program that `device` would run for `jax.jit(fn)(*args, **static)`; arguments as of `lower_for`."""
    return compile_lowered(
        lower_for(device, fn, *args, donate_argnums=donate_argnums, static_argnames=static_argnames, **static)
    )


def lower_for(
    device: Any,
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **static: Any,
) -> jax.stages.Lowered:
    """Lowers `jax.jit(fn)(*args, **static)` for a device, without compiling it.

    Args:
      device: one of `tpu_devices` or `gpu_devices`; a sharding of theirs (a NamedSharding), for arrays that all lie
        alike; or a function from a leaf's path and shape to its sharding.
      args: trees of arrays or ShapeDtypeStructs; only shapes and dtypes are read. A leaf that is a ShapeDtypeStruct
        with a sharding keeps it.
      static: the values of `static_argnames`.
    """
    if callable(device):
        place = device
    else:
        everywhere = device if isinstance(device, Sharding) else SingleDeviceSharding(device)

        def place(path, shape):
            return everywhere

    def abstract(path, leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf.shape))

    shapes = jax.tree_util.tree_map_with_path(abstract, args)
    # A partial is new to JAX, which would else give the program of an earlier call, that libtpu does not write again.
    jitted = jax.jit(functools.partial(fn), donate_argnums=donate_argnums, static_argnames=static_argnames)
    return jitted.lower(*shapes, **static)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program of `lower_for`."""
    jax.devices()  # which reads XLA_FLAGS
    before = _hlo_files()
    with _apart_from_this_process():
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "3"})  # the tests lower it
    if new := _hlo_files() - before:
        _written[compiled] = max(new)
    return compiled


@contextlib.contextmanager
def _apart_from_this_process() -> Iterator[None]:
    """Hides the settings of programs that run in this process: JAX's cache on disk, and XLA_FLAGS."""
    # JAX's cache on disk stores the program of an absent device, but cannot load it: store nothing.
    shortest = getattr(jax.config, CACHE_FROM)
    jax.config.update(CACHE_FROM, float("inf"))
    # libtpu reads XLA_FLAGS, too, and ends the process at one that only jaxlib knows.
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        jax.config.update(CACHE_FROM, shortest)
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def text(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised HLO of a program, as bench/aot/hlo.py reads it.

    jaxlib may refuse instructions of libtpu's (an `async-update` of three operands, jaxlib 0.10.2). Then this is the
    text that libtpu dumped while `compile_for` compiled the program.
    """
    try:
        found = compiled.as_text()
    except JaxRuntimeError:
        if compiled not in _written:  # not for a TPU
            raise
        return written_text(compiled)
    assert found is not None
    return found


def written_text(compiled: jax.stages.Compiled) -> str:
    """Reads the HLO that libtpu dumped of a program that `compile_for` compiled for a TPU."""
    return _written[compiled].read_text()


@functools.cache
def _libtpu_flags() -> str:
    """Returns LIBTPU_INIT_ARGS followed by the flags of this module: the last of a repeated flag counts."""
    return f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {WRITE_HLO} --xla_jf_dump_to={_hlo_folder()}".strip()


@functools.cache
def _hlo_folder() -> str:
    """Makes the folder that libtpu dumps to; it is removed at the end of the process."""
    folder = tempfile.TemporaryDirectory(prefix="libtpu-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def _hlo_files() -> set[Path]:
    """Returns the dumped files, whose names begin with the time."""
    return set(Path(_hlo_folder()).glob("*-TLP-hlo.txt"))


def _need(module: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise CompilerMissing(f"{module} is not installed: the compilers come with `make test` (extra `aot`)")
