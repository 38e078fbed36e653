"""bench/aot/compilers.py: the compilers of a TPU and of an H200 run here, and this process stays on its CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.aot import compilers, hlo
from tests.aot import compile_for, gpu_devices, tpu_devices

WEIGHT = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
TOKENS = jax.ShapeDtypeStruct((60, 4096), jnp.bfloat16)
CACHE = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)
START = jax.ShapeDtypeStruct((), jnp.int32)


def write_products(weight, tokens, cache, start):
    rows = jnp.einsum("td,fd->tf", tokens, weight)
    return rows.sum(), jax.lax.dynamic_update_slice(cache, rows, (start, 0))


@pytest.mark.parametrize("devices", [tpu_devices, gpu_devices])
def test_donated_cache_is_updated_in_place(devices):
    shapes = (WEIGHT, TOKENS, CACHE, START)
    kept = compile_for(devices()[0], write_products, *shapes).memory_analysis()
    donated = compile_for(devices()[0], write_products, *shapes, donate_argnums=2).memory_analysis()
    cache_bytes = CACHE.size * 2
    assert kept.alias_size_in_bytes == 0
    assert donated.alias_size_in_bytes == cache_bytes
    assert donated.temp_size_in_bytes < cache_bytes
    assert jnp.zeros(1).devices() == {jax.devices()[0]}


def test_sharded_program_holds_its_share_and_communicates():
    mesh = Mesh(tpu_devices()[:4], ("tensor",))

    def place(path, shape):  # the first argument, the weight, is split over its input dimension
        return NamedSharding(mesh, PartitionSpec(None, "tensor") if path[0].idx == 0 else PartitionSpec())

    compiled = compile_for(place, lambda weight, tokens: tokens @ weight.T, WEIGHT, TOKENS)
    assert compiled.memory_analysis().argument_size_in_bytes < WEIGHT.size * 2 / 3
    assert "all-reduce" in compiled.as_text()


def test_static_arguments_select_the_program():
    def scaled(x, *, times):
        return sum(x * i for i in range(times))

    text = compile_for(gpu_devices()[0], scaled, TOKENS, static_argnames="times", times=3).as_text()
    assert "fusion" in text


def test_what_libtpu_writes_is_the_program():
    def turned(weight, tokens):
        return tokens @ weight.T, weight.T

    def product(weight, tokens):
        return turned(weight, tokens)[0]

    for compiled in [compile_for(tpu_devices()[0], fn, WEIGHT, TOKENS) for fn in (turned, product)]:
        written, read = hlo.parse(compilers.written_text(compiled)), hlo.parse(compiled.as_text())
        assert written.computations.keys() == read.computations.keys() and written.entry == read.entry
        for name, instructions in read.computations.items():
            assert [each[:3] for each in written.computations[name]] == [each[:3] for each in instructions]


def test_a_program_that_jaxlib_cannot_read_is_read_as_libtpu_wrote_it(monkeypatch):
    compiled = compile_for(tpu_devices()[0], write_products, WEIGHT, TOKENS, CACHE, START)

    def refused(self):
        raise JaxRuntimeError("async-update has 3 operands")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", refused)
    assert compilers.text(compiled) == compilers.written_text(compiled)
    with pytest.raises(JaxRuntimeError, match="async-update"):  # not made for a TPU: nothing else to read
        compilers.text(compile_for(gpu_devices()[0], write_products, WEIGHT, TOKENS, CACHE, START))
