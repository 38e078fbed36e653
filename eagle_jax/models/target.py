"""Target: what decoding, drafting and training ask of the model whose text is generated.

Letters: B batch, T new tokens, N query heads, K key-value heads, H head dim, D hidden size, V vocabulary.

`Llama` is a target. Another architecture is any class with the members of `Target`; it inherits nothing from here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from eagle_jax.models.cache import CacheShape, KVCache, NewKV
from eagle_jax.models.config import RopeConfig
from eagle_jax.models.layers import AttendLayer


class TargetOutput(NamedTuple):
    """What a pass over T new tokens returns.

    hidden: [B, T, D] after the final norm.
    taps: [B, T, len(taps) * D], the tapped hidden states side by side; None where none was asked for.
    new_kv: the new keys and values, a [B, K, T, H] pair a layer. Empty from `Target.run`, which hands them to `attend`.
    """

    hidden: jax.Array
    taps: jax.Array | None = None
    new_kv: NewKV = ()


class TargetConfig(CacheShape, Protocol):
    """The numbers that are read of a target: these, and what `CacheShape` names."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest text in tokens that the model was trained on. Longer ones warn."""

    @property
    def rope(self) -> RopeConfig:
        """Kind "dynamic" says that cached keys depend on the prompt's length; `RopeConfig()` where they do not."""


class Embedding(Protocol):
    """An array [V, D], or a parameter that holds one."""

    def __getitem__(self, index: Any, /) -> jax.Array:
        """Rows by token id: [B, T] -> [B, T, D]; the whole array for `...`."""


class Target(Protocol):
    """A decoder-only language model: a pytree of weights, with pure methods that work in a trace.

    A class is a pytree if it is an `nnx.Module`, or a dataclass registered with JAX. Its config is no leaf. On a mesh,
    its first leaf says which mesh.
    """

    @property
    def config(self) -> TargetConfig: ...

    @property
    def dtype(self) -> Any:
        """Of hidden states and of the cache."""

    @property
    def embed(self) -> Embedding:
        """The input embedding [V, D]: EAGLE heads without one of their own look tokens up in it."""

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        *,
        prompt_lengths: jax.Array,
        cache: KVCache | None = None,
        taps: tuple[int, ...] = (),
        in_blocks: bool = False,
    ) -> TargetOutput:
        """One pass over T new tokens: a prompt, a chunk of it, a tree, or a single step.

        Does not write to the cache: the caller commits `TargetOutput.new_kv`.

        Args:
          tokens, positions: [B, T] int32.
          mask: [B, T, T] bool, which new tokens each new token attends to (itself included). It also attends to all
            positions of `cache` below the cache's length.
          prompt_lengths: [B] int32, see `rope_angles`.
          taps: as in `run`.
          in_blocks: see `ops.attention.attention`; for chunks of a prompt.
        """

    def run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: AttendLayer,
        *,
        prompt_lengths: jax.Array,
        taps: tuple[int, ...] = (),
    ) -> tuple[TargetOutput, list[Any]]:
        """A pass whose attention the caller computes.

        Args:
          attend: called once a layer, in order: attend(layer index, q, k, v), see `layers.Attend`. Keys are rotated. A
            layer whose attention is not Llama's adds its `Spec`.
          taps: indices of layers; of each, the input is returned. Index num_layers is the last layer's output.
        Returns:
          The output, without `new_kv`, and what `attend` kept of each layer, unchanged.
        """

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] after the final norm -> logits [..., V], float32."""

    def output_weight(self) -> jax.Array:
        """[V, D]: `logits` is its product with `hidden`. Training multiplies with it a chunk of positions at a time."""


MEMBERS = tuple(name for name in vars(Target) if not name.startswith("_"))


def missing_members(model: Any) -> list[str]:
    """The members of `Target` that a model lacks; empty for a target."""
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    return missing if callable(model) else [*missing, "__call__"]
