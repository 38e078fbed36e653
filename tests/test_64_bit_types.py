"""A process with 64-bit types on (JAX_ENABLE_X64=1) gets the texts of any other, computed in 32 bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Draft, Llama, Proposal, SamplingConfig, StaticTree, TreeConfig
from eagle_jax.train import eagle1_loss, eagle3_loss
from eagle_jax.tree import Acceptance, Tree, accept_greedy
from tests.decode.test_sampled_distribution import tiny_config
from tests.drafts.kinds import KINDS
from tests.toy import GOLDEN, rows_of, scaled

CONFIG = dataclasses.replace(tiny_config(), num_layers=1)
PROMPTS = np.array([[1, 2, 3, 4, 1, 2], [4, 5, 6, 0, 0, 0]]), np.array([6, 3])
NEW = 9
OWN_CODE = ["eagle1", "eagle3 adaptive", "medusa", "draft model", "lookahead", "prompt lookup", "toy"]
TEMPERATURES = np.array([0.8, 0.0])
RICH = SamplingConfig(TEMPERATURES, 5, 0.9, 0.01, 1.2, np.zeros(CONFIG.vocab_size))


@contextlib.contextmanager
def wide():
    jax.config.update("jax_enable_x64", True)
    try:
        assert jnp.arange(1).dtype == jnp.int64
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@functools.cache
def target() -> Llama:
    with jax.ensure_compile_time_eval():  # in a trace, too
        return scaled(Llama(CONFIG, jax.random.key(0)), 8.0)


@functools.cache
def draft_of(kind: str | None):
    with jax.ensure_compile_time_eval():
        return (None, TreeConfig()) if kind is None else (KINDS[kind].build(CONFIG, 1, 8.0), KINDS[kind].tree)


def assert_narrow(function, *arguments) -> None:
    """No value of a function's program is a float of 64 bits; nor are outputs and what loops carry integers of 64."""

    def is_wide(aval, kinds) -> bool:
        return getattr(aval, "dtype", None) in kinds and not aval.weak_type

    def inner(value):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            return [value.jaxpr]
        if isinstance(value, jax.extend.core.Jaxpr):
            return [value]
        return [one for part in value for one in inner(part)] if isinstance(value, list | tuple) else []

    def check(program) -> None:
        for equation in program.eqns:
            kinds = [jnp.float64]
            if equation.primitive.name in ("while", "scan", "cond"):
                kinds += [jnp.int64, jnp.uint64]
            found = [v.aval for v in equation.outvars if is_wide(v.aval, kinds)]
            assert not found, (found, equation.primitive, jax.extend.source_info_util.summarize(equation.source_info))
            for value in equation.params.values():
                for one in inner(value):
                    check(one)

    with wide():
        program = jax.make_jaxpr(function)(*arguments)
    assert not [aval for aval in program.out_avals if is_wide(aval, [jnp.float64, jnp.int64, jnp.uint64])]
    check(program.jaxpr)


def generate(kind, key=None, **options) -> eagle_jax.Output:
    draft, tree = draft_of(kind)
    return eagle_jax.generate(target(), draft, *PROMPTS, key, tree=tree, max_new_tokens=NEW, **options)


COUPLED = dict(sampling=SamplingConfig(TEMPERATURES, coupled=True), stop_tokens=(7,), log_probs=True)


@functools.cache
def plain_text() -> eagle_jax.Output:
    """Of 32 bits; coupled, so that every draft gives this text."""
    return jax.device_get(generate(None, jax.random.key(1), **COUPLED))


@pytest.mark.parametrize("kind", [None, *OWN_CODE])
def test_generate_and_stream(kind):
    """A sampled row and a greedy one; and by trace alone the greedy program."""
    narrow = plain_text()
    draft, tree = draft_of(kind)
    with wide():
        out = generate(kind, jax.random.key(1), **COUPLED)
        stream = eagle_jax.stream(
            target(), draft, *PROMPTS, jax.random.key(1), tree=tree, max_new_tokens=NEW, **COUPLED
        )
        chunks = [jax.device_get(chunk) for chunk in stream]
    assert rows_of(out) == rows_of(narrow)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, narrow)
    np.testing.assert_allclose(out.log_probs, narrow.log_probs, atol=1e-5)
    for row, length in enumerate(PROMPTS[1]):
        streamed = [token for chunk in chunks for token in chunk.tokens[row, : chunk.counts[row]].tolist()]
        assert streamed == rows_of(narrow)[row][length:]
    assert_narrow(lambda: generate(kind, num_samples=2))


@pytest.mark.parametrize("kind", [None, "eagle2", "eagle3 static", "draft model", "draft model dynamic"])
def test_sampling_with_every_control(kind):
    """Also of children that are drawn, and of other trees."""
    assert_narrow(lambda: generate(kind, jax.random.key(1), sampling=RICH))


@pytest.mark.parametrize("kind", ["eagle3", "draft model"])
def test_a_running_batch_and_a_cycle_at_a_time(kind):
    draft, tree = draft_of(kind)

    def run(tokens, length):
        state = eagle_jax.empty_state(target(), draft, 2, 32, tree=tree, sampling=SamplingConfig(1.0))
        state = eagle_jax.insert(
            state, 1, tokens, length, jax.random.key(1), sampling=SamplingConfig(0.5), max_new_tokens=4, reuse=True
        )
        state, chunk = eagle_jax.advance(target(), draft, state, tree=tree, cycles=2)
        return eagle_jax.cycle(target(), draft, state, tree=tree), chunk

    assert_narrow(run, np.arange(8), 5)
    assert_narrow(lambda: eagle_jax.propose(target(), draft, *PROMPTS, tree=tree))


def test_passes_and_losses():
    eagle1, eagle3 = draft_of("eagle1")[0], draft_of("eagle3")[0]

    def arguments():
        tokens, lengths = PROMPTS
        return jnp.array(tokens), jnp.array(lengths), jnp.array(np.ones(tokens.shape, int))

    def passes(draft, tokens, lengths, _):
        _, features = eagle_jax.forward(target(), tokens, lengths, draft)
        return eagle_jax.draft_forward(draft, target(), features, tokens, lengths)

    def eagle3_sum(draft, *arguments):
        losses, accuracies = eagle3_loss(draft, target(), *arguments, steps=3)
        return losses.sum(), (losses, accuracies)

    def eagle1_sum(draft, *arguments):
        losses = eagle1_loss(draft, target(), *arguments, key=jax.random.key(0))
        return sum(losses), losses

    for draft, function in ((eagle1, eagle1_sum), (eagle3, eagle3_sum)):
        expected = jax.jit(function)(draft, *arguments())
        with wide():
            got = jax.jit(function)(draft, *arguments())
            wide_arguments = arguments()
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, expected)
        assert_narrow(passes, draft, *wide_arguments)
        assert_narrow(jax.value_and_grad(function, has_aux=True, allow_int=True), draft, *wide_arguments)


def test_models_read_and_prepared():
    """From files, whatever they hold; and the golden pair's greedy text."""
    folders = GOLDEN / "weights/t1_target", GOLDEN / "weights/t1_eagle3_dv96"
    options = dict(tree=TreeConfig(3, 2, 8), max_new_tokens=8)
    texts = []
    for context in (contextlib.nullcontext(), wide()):
        with context:
            models = eagle_jax.from_pretrained(*folders)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(models)} <= {"float32", "int32"}
            models = [eagle_jax.input_first(model) for model in models]
            texts.append(rows_of(eagle_jax.generate(*models, np.array([[5, 6, 7, 8]]), np.array([4]), **options)))
    assert texts[0] == texts[1]


def test_what_users_write_may_be_wide():
    """A draft whose tree, and a rule whose acceptance, NumPy's and JAX's defaults made 64 bits wide."""

    @jax.tree_util.register_static
    @dataclasses.dataclass(frozen=True)
    class Next(Draft):
        def propose(self, target, state, tree, noise=None):
            root = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
            tokens = jnp.concatenate([root, (root + jnp.arange(1, 3)[None]) % CONFIG.vocab_size], axis=1)
            shape = [jnp.broadcast_to(jnp.array(values), tokens.shape) for values in ([-1, 0, 0], [0, 1, 1])]
            return Proposal(Tree(tokens, *shape, jnp.zeros(tokens.shape)))  # int64 and float64

    def rule(tree, logits, keys):
        found = accept_greedy(tree, logits)
        return Acceptance(*(x + jnp.arange(1)[0] for x in (found.path, found.length, found.bonus)))

    def run():
        options = dict(tree=StaticTree.chain(1), max_new_tokens=NEW, accept_fn=rule)
        return eagle_jax.generate(target(), Next(), *PROMPTS, **options)

    with wide():
        program = jax.make_jaxpr(run)()  # whose loop would refuse a state that changes its types
    assert {aval.dtype for aval in program.out_avals} == {jnp.dtype("int32"), jnp.dtype(bool)}
