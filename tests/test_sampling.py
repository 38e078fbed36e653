"""Processed distributions: against Hugging Face's own processors, a sorting oracle, and the golden tensors."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax import SamplingConfig
from eagle_jax.sampling import _keep_mask, probabilities, process
from tests import processors
from tests.toy import GOLDEN

V = 40

run = jax.jit(probabilities)

# Controls drawn alone and together.
CONTROLS = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    "top_k": st.integers(1, V + 5),
    "top_p": st.sampled_from([0.05, 0.3, 0.8, 0.95, 0.999]),
    "min_p": st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([0.7, 1.2, 2.0]),
}


def logits_of(seed: int, shape: tuple[int, ...], scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    controls=st.one_of(
        *(st.fixed_dictionaries({name: values}) for name, values in CONTROLS.items()),
        st.fixed_dictionaries({}, optional=CONTROLS),
    ),
    biased=st.booleans(),
)
def test_equals_hugging_face(seed, controls, biased):
    """And the sorting oracle, which stands for it where PyTorch is not installed."""
    controls = {"temperature": 1.0} | controls
    logits, rng = logits_of(seed, (V,)), np.random.default_rng(seed)
    text = rng.integers(0, V, 12)
    bias = np.where(rng.random(V) < 0.3, rng.normal(size=V), 0).astype(np.float32) if biased else None
    seen = jnp.zeros(V, bool).at[text].set(True)
    ours = run(jnp.asarray(logits), SamplingConfig(**controls, logit_bias=bias), seen)
    oracle = processors.probabilities(logits, **controls, logit_bias=bias, seen=set(text.tolist()))
    np.testing.assert_allclose(ours, oracle, atol=1e-6)
    if importlib.util.find_spec("torch") is not None:
        np.testing.assert_allclose(ours, hugging_face(logits, text, bias, controls), atol=1e-6)


def hugging_face(logits, text, bias, controls) -> np.ndarray:
    """Probabilities [V] by the processors of transformers."""
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as hf

    make = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    chain = LogitsProcessorList()
    if bias is not None:
        chain.append(hf.SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in enumerate(bias) if b != 0]))
    chain += [kind(controls[name]) for name, kind in make.items() if name in controls]
    scores = chain(torch.tensor(text[None]), torch.tensor(logits[None]))
    return torch.softmax(scores, dim=-1)[0].numpy()


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V), levels=st.sampled_from([2, 5, 1000]))
def test_the_threshold_needs_no_sort_and_keeps_ties(seed, k, levels):
    values = np.round(logits_of(seed, (3, V)) * levels) / levels
    values[0, :4] = [-np.inf, 0.0, -0.0, np.inf]
    kept = _keep_mask(jnp.asarray(values), jnp.ones((3, V)), jnp.full((3, 1), float(k)))
    np.testing.assert_array_equal(kept, values >= np.sort(values, axis=-1)[:, -k, None])


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("sampling_*.npz")))
def test_golden_node_probabilities(name):
    gold = np.load(GOLDEN / f"{name}.npz")
    for prompt in ("p0", "p1"):
        logits = jnp.asarray(gold[f"{prompt}/tree_logits"])
        for c, (temperature, top_p, top_k) in enumerate(gold["configs"]):
            # The reference takes top-p before top-k, so this takes two steps; 0 is off there.
            ours = run(logits, SamplingConfig(temperature=float(temperature), top_p=float(top_p) or 1.0))
            if top_k:
                ours = run(jnp.log(ours), SamplingConfig(temperature=1.0, top_k=int(top_k)))
            np.testing.assert_allclose(ours, gold[f"{prompt}/cfg{c}/node_probs"], atol=1e-5)


def test_a_value_for_each_row():
    logits = jnp.asarray(logits_of(0, (3, 5, V)))
    controls = [
        dict(temperature=0.0),
        dict(temperature=0.7, top_k=4, repetition_penalty=1.5),
        dict(temperature=1.2, top_p=0.6, min_p=0.1),
    ]
    bias = logits_of(1, (3, V))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    defaults = SamplingConfig()
    columns = {name: jnp.array([row.get(name, getattr(defaults, name)) for row in controls]) for name in names}
    seen = jnp.asarray(np.random.default_rng(2).random((3, 5, V)) < 0.2)
    ours = run(logits, SamplingConfig(**columns, logit_bias=bias), seen)
    for row, each in enumerate(controls):
        for node in range(5):
            expected = processors.probabilities(
                np.asarray(logits[row, node]), **each, logit_bias=bias[row], seen=set(np.flatnonzero(seen[row, node]))
            )
            np.testing.assert_allclose(ours[row, node], expected, atol=1e-6)


def test_changing_a_number_compiles_nothing():
    traces = []

    @jax.jit
    def counted(logits, sampling, seen):
        traces.append(1)
        return process(logits, sampling, seen)

    logits, seen = jnp.asarray(logits_of(0, (2, V))), jnp.zeros((2, V), bool)
    for change in (dict(), dict(temperature=0.2), dict(top_k=7), dict(top_p=0.3), dict(min_p=0.2)):
        counted(logits, SamplingConfig(**dict(temperature=1.0) | change), seen)
    counted(logits, SamplingConfig(temperature=1.0, repetition_penalty=1.3), seen)
    assert len(traces) == 1


@pytest.mark.parametrize("array", [False, True])
def test_temperature_0_is_the_first_largest_logit(array):
    logits = jnp.array([[1.0, 5.0, 5.0, -2.0], [-jnp.inf, -3.0, -4.0, -3.0]])
    zero = jnp.zeros(2) if array else 0
    np.testing.assert_array_equal(process(logits, SamplingConfig(zero)), [[-np.inf, 0, *[-np.inf] * 2]] * 2)


def test_a_small_temperature_approaches_greedy_without_overflow():
    logits = jnp.asarray(logits_of(0, (200, V)))
    greedy = probabilities(logits, SamplingConfig(0))
    far = [jnp.abs(probabilities(logits, SamplingConfig(t)) - greedy).max() for t in (1.0, 0.1, 1e-2, 1e-4, 1e-38)]
    assert far == sorted(far, reverse=True) and far[0] > 0.5 and far[-2] < 1e-30 and far[-1] == 0


def test_broken_logits_stay_broken():
    logits = jnp.zeros((3, V)).at[0, 3].set(jnp.nan).at[1].set(-jnp.inf)
    for sampling in (SamplingConfig(1.0), SamplingConfig(jnp.zeros(3)), SamplingConfig(1.0, 5, 0.5, 0.1)):
        top = process(logits, sampling).max(axis=-1)
        assert not jnp.isfinite(top[:2]).any() and jnp.isfinite(top[2])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1.0, r"0 \(greedy\) or a finite number above it; got -1.0"),
        ("temperature", float("nan"), "got nan"),
        ("temperature", float("inf"), "got inf"),
        ("temperature", True, "got True"),
        ("top_p", 0, r"above 0, and at most 1 \(off\); got 0"),
        ("top_p", 1.01, "got 1.01"),
        ("top_k", -1, "a whole number.* got -1"),
        ("top_k", 2.5, "got 2.5"),
        ("min_p", -0.1, r"0 \(off\) to 1; got -0.1"),
        ("min_p", "0.1", "got '0.1'"),
        ("repetition_penalty", 0, "above 0; 1 is off; got 0"),
        ("temperature", np.array([0.5, -0.5]), r"\[1\] must be .* got -0.5"),
    ],
)
def test_values_out_of_range_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=rf"sampling\.{field}.*{allowed}"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (lambda: SamplingConfig(jnp.array([0.5, -0.5])), r"temperature\[1\] must be .* got -0.5"),
        (lambda: SamplingConfig(jnp.ones(3)), r"temperature must be one number or \[2\], one a row; got \(3,\)"),
        (lambda: SamplingConfig(1.0, logit_bias=jnp.zeros(7)), r"logit_bias must be \[40\] or \[2, 40\]; got \(7,\)"),
        (lambda: SamplingConfig(1.0, logit_bias=jnp.full(V, jnp.inf)), "finite, or -inf to forbid a token"),
    ],
)
def test_values_that_do_not_fit_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling().check(2, V)
