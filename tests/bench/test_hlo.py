"""bench/aot/hlo.py: on programs written by hand, and on what XLA makes of a decoder for this machine's CPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from bench.aot import hlo, programs
from bench.shapes import ONE_PASS, SHAPES, abstract_pair
from eagle_jax.decode.cycle import step

# A loop of 7 turns, each a fusion that is a transpose, one that computes, a copy, a prefetch and a product by a
# library; before it a condition, after it a copy of the result and one too small to count.
LOOP = 'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}'
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_transpose (p: bf16[2048,1024]) -> bf16[1024,2048] {
  %p = bf16[2048,1024]{1,0} parameter(0)
  %t = bf16[1024,2048]{1,0} transpose(%p), dimensions={1,0}
  ROOT %b = bf16[1024,2048]{1,0} bitcast(%t)
}

%fused_product (p.1: bf16[2048,1024]) -> bf16[2048] {
  %p.1 = bf16[2048,1024]{1,0} parameter(0)
  %t.1 = bf16[1024,2048]{1,0} transpose(%p.1), dimensions={1,0}
  ROOT %r = bf16[2048]{0} reduce(%t.1), dimensions={0}, to_apply=%add
}

%body (carry: (s32[], bf16[2048,1024], /*index=2*/bf16[1,8,8320,128])) -> (s32[], bf16[2048,1024], bf16[1,8,8320,128]) {
  %carry = (s32[], bf16[2048,1024]{1,0}, /*index=2*/bf16[1,8,8320,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %w = bf16[2048,1024]{1,0} get-tuple-element(%carry), index=1
  %c = bf16[1,8,8320,128]{3,2,1,0} get-tuple-element(%carry), index=2
  %turned = bf16[1024,2048]{1,0} fusion(%w), kind=kLoop, calls=%fused_transpose
  %product = bf16[2048]{0} fusion(%w), kind=kInput, calls=%fused_product
  %own = bf16[1,8,8320,128]{3,2,1,0} copy(%c), metadata={op_name="jit(step)/while"}
  %fetch = (bf16[2048,1024]{1,0:T(8,128)S(1)}, bf16[2048,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %fetched = bf16[2048,1024]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %library = bf16[2048]{0} custom-call(%fetched, %product), custom_call_target="__cublas$gemm"
  ROOT %next = (s32[], bf16[2048,1024]{1,0}, /*index=2*/bf16[1,8,8320,128]{3,2,1,0}) tuple(%i, %w, %own)
}

%condition (carry.1: (s32[], bf16[2048,1024], /*index=2*/bf16[1,8,8320,128])) -> pred[] {
  %carry.1 = (s32[], bf16[2048,1024]{1,0}, /*index=2*/bf16[1,8,8320,128]{3,2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%i.1, %i.1), direction=LT
}

%as_it_is (x: f32[60,128256]) -> f32[60,128256] {
  ROOT %x = f32[60,128256]{1,0} parameter(0)
}

%changed (x.1: f32[60,128256]) -> f32[60,128256] {
  %x.1 = f32[60,128256]{1,0} parameter(0)
  %sorted = f32[60,128256]{1,0} sort(%x.1), dimensions={1}, to_apply=%add
  ROOT %y = f32[60,128256]{1,0} copy(%sorted)
}

ENTRY %main (a: bf16[2048,1024], b: bf16[1,8,8320,128], l: f32[60,128256], q: pred[]) -> bf16[1,8,8320,128] {
  %a = bf16[2048,1024]{1,0} parameter(0)
  %b.1 = bf16[1,8,8320,128]{3,2,1,0} parameter(1)
  %l = f32[60,128256]{1,0} parameter(2)
  %q = pred[] parameter(3)
  %warm = f32[60,128256]{1,0} conditional(%q, %l, %l), true_computation=%changed, false_computation=%as_it_is
  %start = (s32[], bf16[2048,1024]{1,0}, /*index=2*/bf16[1,8,8320,128]{3,2,1,0}) tuple(%q, %a, %b.1)
  %end = (s32[], bf16[2048,1024]{1,0}, /*index=2*/bf16[1,8,8320,128]{3,2,1,0}) while(%start), TRIPS
  %small = s32[60]{0} copy(%q)
  %last = bf16[1,8,8320,128]{3,2,1,0} get-tuple-element(%end), index=2
  ROOT %out = bf16[1,8,8320,128]{2,3,1,0} copy(%last)
}
""".replace("TRIPS", LOOP)

CACHE, WEIGHT, LOGITS = "bf16[1,8,8320,128]", "bf16[1024,2048]", "f32[60,128256]"


def test_large_copies_are_those_in_memory():
    assert sorted(hlo.large_copies(PROGRAM)) == sorted([WEIGHT, CACHE, LOGITS, CACHE])
    assert sorted(hlo.large_copies(PROGRAM, in_loops=True)) == sorted([WEIGHT, CACHE])
    assert hlo.large_copies(PROGRAM, at_least=2**22, in_loops=True) == [CACHE]
    assert len(hlo.large_copies(PROGRAM, at_least=60)) == 5


@pytest.mark.parametrize(
    ("made", "copies"),
    [
        ("%made = bf16[2048,2048]{1,0:T(8,128)S(1)} copy(%a)", 0),  # a prefetch
        ("%made = bf16[2048,2048]{0,1:T(8,128)S(1)} copy(%computed)", 0),  # turned there
        ("%made = bf16[2048,2048]{0,1:T(8,128)} copy(%computed)", 0),  # its only way into memory
        ("%made = bf16[2048,2048]{0,1:T(8,128)} copy(%fetched)", 1),  # out of memory and into it
        ("%made = bf16[2048,2048]{1,0:T(8,128)} transpose(%fetched)", 1),
        ("%made = bf16[2048,2048]{1,0:T(8,128)} copy(%a)", 1),
        ("%made = bf16[2048,2048]{1,0:T(8,128)} copy(%host)", 1),
    ],
)
def test_on_chip_memory_is_not_memory(made, copies):
    program = f"""ENTRY %main (a: bf16[2048,2048]) -> bf16[2048,2048] {{
  %a = bf16[2048,2048]{{1,0:T(8,128)}} parameter(0)
  %host = bf16[2048,2048]{{1,0:T(8,128)S(5)}} parameter(1)
  %computed = bf16[2048,2048]{{1,0:T(8,128)S(1)}} add(%a, %a)
  %fetch = (bf16[2048,2048]{{1,0:T(8,128)S(1)}}, bf16[2048,2048]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%a)
  %fetched = bf16[2048,2048]{{1,0:T(8,128)S(1)}} copy-done(%fetch)
  ROOT {made}
}}
"""
    assert hlo.large_copies(program) == ["bf16[2048,2048]"] * copies


def test_kernels_count_turns_of_a_loop_and_one_branch():
    turn = 5  # two fusions, the copy, the prefetch, the library's product
    assert hlo.kernels(PROGRAM) == 2 + 7 * turn + 2  # sort and copy; the loop; two copies
    assert hlo.kernels(PROGRAM, min) == 7 * turn + 2
    unknown = PROGRAM.replace('"known_trip_count":{"n":"7"}', "")
    assert hlo.kernels(unknown) == 2 + (turn + 1) + 2  # once, with the comparison of its condition


def test_products_count_turns_of_a_loop():
    def fn(x, w):
        x = jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)
        return x @ w[:, :5]

    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((12, 16), (16, 16)))
    assert hlo.products(compiled(fn, x, w)) == {"f32[12,16]": 7, "f32[12,5]": 1}


@pytest.mark.parametrize(
    ("type_", "size"), [("bf16[8,4]{1,0}", 32), ("(f32[3], s32[])", 3), ("s32[]", 1), ("token", 0)]
)
def test_elements(type_, size):
    assert hlo.elements(type_) == size


def compiled(fn, *args, **jit) -> str:
    return jax.jit(fn, **jit).lower(*args).compile().as_text()


def test_a_copy_that_xla_needs_is_seen():
    cache, rows = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((2, 32), jnp.float32)

    def overwrite(cache, rows):
        return jax.lax.dynamic_update_slice(cache, rows, (3, 0))

    assert hlo.large_copies(compiled(overwrite, cache, rows), 64 * 32) == ["f32[64,32]"]
    assert hlo.large_copies(compiled(overwrite, cache, rows, donate_argnums=0), 64 * 32) == []
    assert hlo.large_copies(compiled(jnp.transpose, cache), 64 * 32) == ["f32[32,64]"]


def test_a_cpu_copies_no_weight_and_no_cache_in_any_loop_of_generate():
    """float32: a CPU computes bfloat16 products in it, and converts weights to do so."""
    program = programs.generate(SHAPES["tiny"], capacity=1200, prompt=600, dtype=jnp.float32)
    assert program.copies(jax.jit(program.fn).lower(*program.args).compile(), jax.devices()[0], at_least=2048) == []


@pytest.mark.parametrize("pending", [False, True], ids=["no prompt pending", "prompts may be pending"])
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "speculative"])
def test_a_cpu_copies_no_cache_in_a_cycle(drafts, pending):
    target, draft = abstract_pair(SHAPES["tiny"], jnp.float32)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 32), (4,)))
    head = draft if drafts else None
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=300), target, head, tokens, lengths)

    def cycle(target, head, state):
        run = eagle_jax.cycle if pending else lambda *args, **options: step(*args, **options).state
        return run(target, head, state, tree=eagle_jax.TreeConfig(3, 2, 6))

    assert hlo.large_copies(compiled(cycle, target, head, state, donate_argnums=2), state.cache.k[0].size) == []


@pytest.mark.parametrize("head", ONE_PASS)
def test_a_cpu_copies_no_weight_and_no_cache_in_a_cycle_of_one_draft_pass(head):
    shape = SHAPES["tiny"]
    target, draft = abstract_pair(shape, jnp.float32, head)
    target, draft = jax.eval_shape(eagle_jax.input_first, (target, draft))
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 32), (4,)))
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=300), target, draft, tokens, lengths)

    def cycle(target, draft, state):
        return step(target, draft, state, tree=eagle_jax.BestPrefixes(4, 9)).state

    smallest = min(leaf.size for leaf in jax.tree.leaves((target, draft)) if leaf.ndim > 1 and min(leaf.shape) > 1)
    assert hlo.large_copies(compiled(cycle, target, draft, state, donate_argnums=2), smallest) == []


def test_a_cpu_copies_no_weight_that_is_stored_input_first():
    target, draft = jax.eval_shape(eagle_jax.input_first, abstract_pair(SHAPES["tiny"], jnp.float32))
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 32), (1,)))
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=300), target, draft, tokens, lengths)

    def cycle(target, draft, state):
        return step(target, draft, state, tree=eagle_jax.TreeConfig(3, 2, 6)).state

    smallest = min(leaf.size for leaf in jax.tree.leaves(target) if leaf.ndim > 1)
    assert hlo.large_copies(compiled(cycle, target, draft, state, donate_argnums=2), smallest) == []
