"""A step's loss and gradient do not depend on how the batch is laid out, cut into pieces or spread over devices."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from eagle_jax import DraftConfig, Eagle1Draft, Eagle3Draft, Llama, LlamaConfig
from eagle_jax.models import params
from eagle_jax.ops.linear import linear
from eagle_jax.sharding import path_name, path_sharding
from eagle_jax.train import optimizer_state, optimizer_step
from eagle_jax.train.config import LossSettings, OptimizerSettings
from eagle_jax.train.data.dataset import Dataset, pack
from eagle_jax.train.data.loader import on_mesh
from eagle_jax.train.loss import vocabulary
from eagle_jax.train.loss.objective import Eagle1Objective, Eagle3Objective, TargetObjective
from eagle_jax.train.loss.vocabulary import (
    Labels,
    Soft,
    likeliest_tokens,
    vocabulary_loss,
    vocabulary_losses,
    weighted_loss,
)
from eagle_jax.train.run import optimizer, step
from eagle_jax.train.run.assemble import TRAINED
from tests.toy import scaled

TARGET = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4
)
HEAD = DraftConfig(
    **{**TARGET.__dict__, "num_layers": 1}, draft_vocab_size=40, target_hidden_size=32, fc_bias=True, taps=(0, 1, 2)
)
KINDS = ("eagle3", "eagle1", "target")
OBJECTIVES = {
    "eagle3": Eagle3Objective((1.0, 0.8, 0.64), chunk=37),
    "eagle1": Eagle1Objective(noise=False, chunk=37),
    "target": TargetObjective(chunk=37),
    "eagle3 lk": Eagle3Objective((1.0, 0.8, 0.64), chunk=37, token_loss="lk_adaptive"),
    "eagle3 with features": Eagle3Objective((1.0, 0.8, 0.64), feature_weight=3.0, chunk=37),
}
WIDTH = 24
# An optimiser that changes nothing and keeps the gradient.
KEEP = optax.GradientTransformation(
    lambda masters: jax.tree.map(jnp.zeros_like, masters),
    lambda gradients, state, masters=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


@functools.cache
def models(kind: str) -> tuple[Any, Llama | None]:
    target = scaled(Llama(TARGET, jax.random.key(0)), 6.0)
    if kind == "target":
        return target, None
    if kind == "eagle1":
        return scaled(Eagle1Draft(dataclasses.replace(HEAD, draft_vocab_size=0), jax.random.key(1)), 6.0), target
    head = scaled(Eagle3Draft(HEAD, 3, jax.random.key(1)), 6.0)
    ids = np.sort(np.random.default_rng(2).choice(96, 40, replace=False)).astype(np.int32)
    return params.load(head, params.flatten(head) | {"target_ids": jnp.asarray(ids)}), target


@functools.cache
def documents() -> Dataset:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 14, 24)
    tokens = rng.integers(0, 96, lengths.sum()).astype(np.int32)
    mask = rng.integers(0, 3, lengths.sum()).clip(max=1).astype(np.uint8)
    return Dataset(tokens, mask, np.concatenate([[0], lengths.cumsum()]))


def batch_of(rows: list[list[int]], width: int = WIDTH) -> dict[str, np.ndarray]:
    made = [documents().row(row, width) for row in rows]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def padded() -> dict[str, np.ndarray]:
    return batch_of([[index] for index in range(24)], 16)


def gradient_of(kind: str, batch: dict[str, Any], pieces: int = 1, objective: Any = None, mesh: Any = None):
    """Metrics and {path: gradient} of a step."""
    model, target = models(kind)
    masters, frozen = step.split(model, () if kind == "target" else step.FROZEN)
    state = step.initial_state(masters, KEEP, 0)
    if mesh is not None:

        def place(path, leaf):
            return jax.device_put(leaf, path_sharding(path_name(path), leaf.shape, mesh))

        state = jax.device_put(state, step.state_shardings(state, mesh))
        frozen, target = jax.tree_util.tree_map_with_path(place, (frozen, target))
        batch = on_mesh(batch, mesh)

    @jax.jit
    def run(state, frozen, target, batch):
        return step.train_step(
            state, model, frozen, target, batch, objective=objective or OBJECTIVES[kind], update=KEEP, pieces=pieces
        )

    state, metrics = run(state, frozen, target, batch)
    return jax.device_get(metrics), jax.device_get(state.optimizer)


@functools.cache
def padded_gradient(kind: str):
    return gradient_of(kind, padded())


def assert_same(ours, theirs) -> None:
    """Losses within 1e-6, gradients within 1e-5 of the largest magnitude of each array."""
    for name in theirs[0]:
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=3e-6, err_msg=name)
    np.testing.assert_allclose(ours[0]["loss"], theirs[0]["loss"], rtol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and len(theirs[1]) > 5
    for path, gradient in theirs[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0, path
        assert np.abs(ours[1][path] - gradient).max() <= 1e-5 * largest, path


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_packed_rows_learn_what_padded_ones_do(kind):
    rows = pack(documents().lengths, WIDTH)
    assert max(map(len, rows)) > 2 and sum(map(len, rows)) == 24
    assert_same(gradient_of(kind, batch_of(rows)), padded_gradient(kind))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_batch_in_pieces_is_the_large_batch(kind):
    assert_same(gradient_of(kind, padded(), pieces=4), padded_gradient(kind))


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=["data", "fsdp", "tensor", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_compute_what_one_does(kind, axes):
    mesh = jax.make_mesh(axes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert_same(gradient_of(kind, padded(), mesh=mesh), padded_gradient(kind))


def test_the_official_alignment_in_pieces():
    objective = Eagle3Objective((1.0, 0.8), alignment="official", chunk=37)
    whole = gradient_of("eagle3", padded(), objective=objective)
    assert_same(gradient_of("eagle3", padded(), pieces=2, objective=objective), whole)


def test_kl_is_the_cross_entropy_but_for_a_constant():
    soft = padded_gradient("eagle3")
    kl = gradient_of("eagle3", padded(), objective=Eagle3Objective((1.0, 0.8, 0.64), divergence="kl"))
    assert (kl[0]["losses"] < soft[0]["losses"]).all() and (kl[0]["losses"] > 0).all()
    for path, gradient in soft[1].items():
        assert np.abs(kl[1][path] - gradient).max() <= 1e-5 * np.abs(gradient).max(), path


@pytest.mark.parametrize(("chunk", "softcap"), [(1, None), (10, None), (33, None), (1000, None), (10, 2.0)])
@pytest.mark.parametrize("soft", [True, False])
def test_the_vocabulary_loss_in_chunks_is_the_plain_one(soft, chunk, softcap):
    keys = jax.random.split(jax.random.key(5), 5)
    x, weight = jax.random.normal(keys[0], (3, 11, 8)), jax.random.normal(keys[1], (19, 8))
    hidden, rows = jax.random.normal(keys[2], (3, 11, 6)), jax.random.normal(keys[3], (19, 6))
    ids = jax.random.randint(keys[4], (3, 11), 0, 19)
    importance = jnp.arange(33.0).reshape(3, 11) % 3

    def logits(x, weight):
        return x @ weight.T if softcap is None else softcap * jnp.tanh(x @ weight.T / softcap)

    wanted = jax.nn.softmax(logits(hidden, rows)) if soft else jax.nn.one_hot(ids, 19)

    def plain(x, weight):
        return (importance * -(wanted * jax.nn.log_softmax(logits(x, weight))).sum(-1)).sum()

    def ours(x, weight):
        teacher = Soft(hidden, rows, softcap) if soft else Labels(ids)
        return vocabulary_loss(x, weight, teacher, importance, chunk, softcap=softcap)

    sums = ours(x, weight)
    np.testing.assert_allclose(sums.loss, plain(x, weight), rtol=1e-6)
    match = (x @ weight.T).argmax(-1) == wanted.argmax(-1)
    np.testing.assert_allclose(sums.match, (importance * match).sum())
    entropy = -(wanted * jnp.log(jnp.where(wanted > 0, wanted, 1))).sum(-1)
    np.testing.assert_allclose(sums.entropy, (importance * entropy).sum(), rtol=1e-5, atol=1e-5)
    theirs = jax.grad(plain, argnums=(0, 1))(x, weight)
    for a, b in zip(jax.grad(lambda *args: 2 * ours(*args).loss, argnums=(0, 1))(x, weight), theirs, strict=True):
        np.testing.assert_allclose(a, 2 * b, atol=1e-5)
    np.testing.assert_array_equal(likeliest_tokens(hidden, rows, chunk, softcap), (hidden @ rows.T).argmax(-1))


@pytest.mark.parametrize("chunk", [2, 10, 33])
@pytest.mark.parametrize("soft", [True, False])
def test_losses_of_several_steps_are_each_its_own(soft, chunk):
    """Step k's teacher is k places on."""
    keys = jax.random.split(jax.random.key(6), 4)
    x, weight = jax.random.normal(keys[0], (4, 3, 11, 8)), jax.random.normal(keys[1], (19, 8))
    hidden, rows = jax.random.normal(keys[2], (3, 14, 6)), jax.random.normal(keys[3], (19, 6))
    teacher = Soft(hidden, rows) if soft else Labels((hidden @ rows.T).argmax(-1))
    importance = (jnp.arange(132.0) % 5).reshape(4, 3, 11)
    step_weights = jnp.array([1.0, 0.5, 2.0, 0.1])

    def together(x, weight):
        return vocabulary_losses(x, weight, teacher, importance, chunk)

    def one_by_one(x, weight):
        cut = [teacher._replace(**{teacher._fields[0]: teacher[0][:, k : k + 11]}) for k in range(4)]
        sums = [vocabulary_loss(x[k], weight, cut[k], importance[k], chunk) for k in range(4)]
        return jax.tree.map(lambda *values: jnp.stack(values), *sums)

    for ours, right in zip(together(x, weight), one_by_one(x, weight), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-6)
    gradients = (
        jax.grad(lambda x, weight, sums=sums: (step_weights * sums(x, weight).loss).sum(), argnums=(0, 1))(x, weight)
        for sums in (together, one_by_one)
    )
    for ours, right in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-5)


@pytest.mark.parametrize("token_loss", ["cross_entropy", "lk"])
def test_gradients_made_forward_are_those_made_backward(token_loss):
    keys = jax.random.split(jax.random.key(7), 4)
    x, weight = jax.random.normal(keys[0], (4, 3, 11, 8)), jax.random.normal(keys[1], (19, 8))
    teacher = Soft(jax.random.normal(keys[2], (3, 14, 6)), jax.random.normal(keys[3], (19, 6)))
    importance, step_weights = (jnp.arange(132.0) % 5).reshape(4, 3, 11), jnp.array([1.0, 0.5, 2.0, 0.1])

    def forward(x, weight):
        total, sums = weighted_loss(x, weight, teacher, importance, step_weights, 10, token_loss)
        return 3 * total, sums

    def backward(x, weight):
        sums = vocabulary_losses(x, weight, teacher, importance, 10, token_loss)
        return 3 * (step_weights * sums.loss).sum(), sums

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, weight) for f in (forward, backward))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def token_loss_of(token_loss: str, logits: np.ndarray, wanted: np.ndarray, share: np.ndarray | None = None):
    """The loss of positions [P], float64, and the share of KL in the mixture, which the gradient holds constant."""
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    accepted = np.minimum(wanted, np.exp(log_q)).sum(-1)
    share = np.exp(-3 * accepted) if share is None else share
    mixture = share * (wanted * (np.log(wanted) - log_q)).sum(-1) + (1 - share) * (1 - accepted)
    return {"cross_entropy": -(wanted * log_q).sum(-1), "lk": -np.log(accepted), "lk_adaptive": mixture}[
        token_loss
    ], share


@pytest.mark.parametrize("token_loss", ["cross_entropy", "lk", "lk_adaptive"])
def test_token_losses_and_their_gradients_by_finite_differences(token_loss):
    """Logits are x itself, and the teacher's the logarithms of p."""
    rng = np.random.default_rng(8)
    logits, wanted = 2 * rng.normal(size=(6, 9)), rng.dirichlet(np.ones(9), 6)
    importance = np.array([1.0, 0, 2, 1, 0.5, 1])
    teacher = Soft(jnp.log(wanted)[None].astype(jnp.float32), jnp.eye(9))

    def ours(x):
        return vocabulary_loss(x, jnp.eye(9), teacher, jnp.asarray(importance)[None], 4, token_loss).loss

    loss, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(logits, jnp.float32)[None])
    expected, share = token_loss_of(token_loss, logits, wanted)
    np.testing.assert_allclose(loss, (importance * expected).sum(), rtol=1e-5)
    for entry in np.ndindex(logits.shape):
        step = np.zeros(logits.shape)
        step[entry] = 1e-6
        high, low = (token_loss_of(token_loss, logits + s * step, wanted, share)[0][entry[0]] for s in (1, -1))
        np.testing.assert_allclose(gradient[0][entry], importance[entry[0]] * (high - low) / 2e-6, atol=2e-5)


def test_distributions_without_a_common_token_give_a_finite_loss():
    teacher = Soft(jnp.array([[[200.0, 0, 0]]]), jnp.eye(3))
    for token_loss in ("lk", "lk_adaptive"):
        loss = functools.partial(vocabulary_loss, token_loss=token_loss)
        value, gradient = jax.value_and_grad(lambda x, loss=loss: loss(x, jnp.eye(3), teacher, jnp.ones((1, 1))).loss)(
            jnp.array([[[0.0, 0, 200]]])
        )
        assert 50 < value < 300 and np.isfinite(gradient).all()


def test_the_objective_of_the_settings_is_that_of_the_token_loss():
    for kind in ("eagle1", "eagle3"):
        training = TRAINED[kind]
        assert training is not None
        assert training.objective(LossSettings(objective="lk"), None, 8).token_loss == "lk"
    with pytest.raises(ValueError, match="divergence kl is of cross-entropy, not of objective lk"):
        LossSettings(objective="lk", divergence="kl")
    with pytest.raises(ValueError, match='divergence "kl" is of cross-entropy'):
        Eagle3Objective(divergence="kl", token_loss="lk")
    with pytest.raises(ValueError, match="token_loss must be one of cross_entropy, lk, lk_adaptive, got 'tv'"):
        Eagle1Objective(token_loss="tv")


@pytest.mark.parametrize(
    ("together", "products"), [(True, {"teacher": 1, "draft": 4}), (False, {"teacher": 2, "draft": 8})]
)
def test_the_teacher_s_product_is_made_once_for_all_steps(monkeypatch, together, products):
    x, weight = jnp.ones((4, 3, 11, 8)), jnp.ones((19, 8))
    teacher, importance, counts = Soft(jnp.ones((3, 14, 6)), jnp.ones((19, 6))), jnp.ones((4, 3, 11)), Counter()

    def counted(x, weight, dtype):
        name = "teacher" if weight.shape == teacher.rows.shape else "draft"
        jax.debug.callback(lambda: counts.update([name]))
        return linear(x, weight, dtype)

    def loss(x, weight):
        if together:
            return weighted_loss(x, weight, teacher, importance, jnp.ones(4), 33)[0]
        return vocabulary_losses(x, weight, teacher, importance, 33).loss.sum()

    monkeypatch.setattr(vocabulary, "linear", counted)
    jax.block_until_ready(jax.grad(loss, (0, 1))(x, weight))
    jax.effects_barrier()
    assert counts == products


def test_bfloat16_computes_near_float32_masters():
    """The masters and their gradient stay float32; only the products are rounded."""
    objective = Eagle3Objective((1.0, 0.8, 0.64), dtype=jnp.bfloat16)
    metrics, gradient = gradient_of("eagle3", padded(), objective=objective)
    theirs = padded_gradient("eagle3")
    assert all(array.dtype == np.float32 for array in gradient.values())
    np.testing.assert_allclose(metrics["losses"], theirs[0]["losses"], rtol=0.03)
    for path, array in theirs[1].items():
        cosine = (gradient[path] * array).sum() / np.linalg.norm(gradient[path]) / np.linalg.norm(array)
        assert cosine > 0.98, path
    assert any(np.abs(gradient[path] - array).max() > 1e-4 * np.abs(array).max() for path, array in theirs[1].items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_schedules_and_clipping(name):
    settings = OptimizerSettings(name=name, learning_rate=0.1, warmup_steps=4, schedule="trapezoid", clip_value=1.0)
    rates = [float(optimizer.schedule(settings, 54)(i)) for i in range(54)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    assert rates[43] == 1.0 and rates[44] <= 1.0 and 0 < rates[53] < 0.15
    linear = optimizer.schedule(OptimizerSettings(warmup_steps=0, final_fraction=0.5), 10)
    np.testing.assert_allclose([float(linear(i)) for i in (0, 5, 10)], [1.0, 0.75, 0.5], rtol=1e-6)

    masters = {"layers.0.mlp.up": jnp.ones((4, 6)), "layers.0.attention.q": jnp.ones((2, 3, 6)), "norm": jnp.ones(6)}
    update = optimizer.optimizer(settings, 54)
    gradient = jax.tree.map(lambda a: 100 * jax.random.normal(jax.random.key(1), a.shape), masters)
    changes, _ = update.update(gradient, update.init(masters), masters)
    assert all(0 < np.abs(change).max() < 0.1 for change in jax.tree.leaves(changes))


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
def test_a_step_of_a_head_is_the_run_s_and_compiles_once(kind):
    """With SGD of rate 1 the head moves by the run's gradient; the target's and the head's weights are arguments."""
    head, target = models(kind)
    traces, sgd, batch = [], optax.sgd(1.0), padded()

    @functools.partial(jax.jit, donate_argnames="state")
    def move(draft, state, target, tokens, lengths, loss_mask, documents):
        traces.append(kind)
        return optimizer_step(
            draft,
            state,
            target,
            tokens,
            lengths,
            loss_mask,
            optimizer=sgd,
            objective=OBJECTIVES[kind],
            documents=documents,
        )

    moved, state, metrics = move(head, optimizer_state(head, sgd), target, **batch)
    before, after, theirs = params.flatten(head), params.flatten(moved), padded_gradient(kind)
    np.testing.assert_allclose(metrics["loss"], theirs[0]["loss"], rtol=1e-6)
    assert before.keys() - theirs[1].keys() <= {"embed", "target_ids"}
    for path, array in before.items():
        expected = array - theirs[1].get(path, 0)
        np.testing.assert_allclose(after[path], expected, atol=1e-5 * np.abs(expected).max(), err_msg=path)
    changed = jax.tree.map(lambda weight: weight * 1.5, target)
    _, state, other = move(moved, state, changed, **batch)
    assert traces == [kind] and state.step == 2 and other["loss"] != metrics["loss"]


def test_steps_below_the_rounding_of_a_bfloat16_head_add_up():
    head, target = models("eagle1")
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), head)
    sgd = optax.sgd(1e-5)
    state = optimizer_state(rounded, sgd)
    with pytest.raises(ValueError, match="the state is of another head"):
        optimizer_step(models("eagle3")[0], state, target, *[None] * 3, optimizer=sgd, objective=Eagle3Objective())
    texts = [padded()[name] for name in ("tokens", "lengths", "loss_mask")]
    step_of = functools.partial(optimizer_step, optimizer=sgd, objective=Eagle1Objective(noise=False))
    moved, after, _ = jax.jit(step_of)(rounded, state, target, *texts)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
    assert (moved.fc[...] == rounded.fc[...]).mean() > 0.9
    assert (after.masters["fc"] != state.masters["fc"]).mean() > 0.5
