"""Target: the protocol of the model whose text is generated, as decoding, drafting and training use it.

`Llama` implements it. So does any class with the members of `Target`; it need not inherit.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Bool, Float, Float32, Int

from eagle_jax.models.cache import CacheShape, KVCache, NewKV
from eagle_jax.models.layers import AttendLayer
from eagle_jax.models.rope import RopeConfig
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN


class TargetOutput(NamedTuple):
    """The outputs of a pass over new tokens.

    hidden: after the final norm.
    taps: the tapped layers' hidden states, concatenated: taps * hidden numbers. None without taps.
    new_kv: keys and values of the new tokens, a pair for each layer. Empty from `Target.run`, which hands them to
      `attend`.
    """

    hidden: Float[Array, "batch new hidden"]
    taps: Float[Array, "batch new features"] | None = None
    new_kv: NewKV = ()


class TargetConfig(CacheShape, Protocol):
    """The fields that are read of a target's config: these, and those of `CacheShape`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int:
        """The longest text, in tokens, that the model was trained on. Longer ones warn."""

    @property
    def rope(self) -> RopeConfig:
        """Its `by_length` says whether cached keys depend on the prompt's length; if not, `RopeConfig()` will do."""


class Embedding(Protocol):
    """An array [vocab, hidden], or a parameter that holds one."""

    def __getitem__(self, index: Any, /) -> jax.Array:
        """Looks up token ids [batch, new]: [batch, new, hidden]. `...` returns the whole array."""


class Target(Protocol):
    """A decoder-only language model: a pytree of weights, with pure methods that work in a trace.

    An `nnx.Module` is a pytree, and so is a dataclass registered with JAX. The config must be static. A target lies on
    the mesh of its first leaf.
    """

    @property
    def config(self) -> TargetConfig: ...

    @property
    def dtype(self) -> Any:
        """The dtype of hidden states and of the cache."""

    @property
    def embed(self) -> Embedding:
        """The input embedding; EAGLE heads without an embedding use it, too."""

    def __call__(
        self,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        mask: Bool[Array, "batch new new"],
        *,
        prompt_lengths: Int[Array, " batch"],
        cache: KVCache | None = None,
        taps: tuple[int, ...] = (),
        in_blocks: bool = False,
    ) -> TargetOutput:
        """Runs new tokens: a prompt, a chunk of it, a tree, or a single step.

        Does not write to the cache; the caller commits `TargetOutput.new_kv`.

        Args:
          mask: True for the new tokens that a new token attends to (itself included). It also attends
            to `cache` below the cache's length.
          prompt_lengths: see `rope_angles`.
          taps: as in `run`.
          in_blocks: see `ops.attention.attention`; for chunks of a prompt.
        """

    def run(
        self,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        attend: AttendLayer,
        *,
        prompt_lengths: Int[Array, " batch"] | Int[Array, "batch new"],
        taps: tuple[int, ...] = (),
    ) -> tuple[TargetOutput, list[Any]]:
        """Runs a pass whose attention the caller computes.

        Args:
          attend: called for each layer in order, attend(layer index, q, k, v), with rotated q and k. A layer whose
            attention is not plain adds its `Spec`. See `layers.Attend`.
          taps: indices of the layers whose input is returned; index num_layers is the last layer's output.
        Returns:
          The output without `new_kv`, and a list of what `attend` returned for each layer beside its result.
        """

    def logits(self, hidden: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens vocab"]:
        """Turns hidden states after the final norm into logits."""

    def output_weight(self) -> Float[Array, "vocab hidden"]:
        """Returns the matrix of `logits`, by which training multiplies a chunk of positions at a time.

        If `logits` caps the products, the config says so by `logit_softcap`.
        """


def cached_pass(
    self: Target,
    tokens: Int[Array, "batch new"],
    positions: Int[Array, "batch new"],
    mask: Bool[Array, "batch new new"],
    *,
    prompt_lengths: Int[Array, " batch"],
    cache: KVCache | None = None,
    taps: tuple[int, ...] = (),
    in_blocks: bool = False,
) -> TargetOutput:
    """Runs new tokens by `run`, with `ops.attention`. The `__call__` of a class that has a `run`; see `Target`."""

    def attend(index, q, k, v, spec=PLAIN):
        old = None if cache is None else cache.layer(index)
        return attention(q, k, v, mask, old, spec=spec, positions=positions, in_blocks=in_blocks), (k, v)

    output, new_kv = self.run(tokens, positions, attend, prompt_lengths=prompt_lengths, taps=taps)
    return output._replace(new_kv=new_kv)


def logit_softcap(target: Target) -> float | None:
    """Returns the cap that `logits` applies to products with the output weight; None if the config has none."""
    return getattr(target.config, "logit_softcap", None)


MEMBERS = tuple(name for name in vars(Target) if not name.startswith("_"))


def missing_members(model: Any) -> list[str]:
    """Lists the members of `Target` that a model lacks; empty for a target."""
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    return missing if callable(model) else [*missing, "__call__"]
