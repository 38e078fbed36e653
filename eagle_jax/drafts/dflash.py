"""DFlash: a block of tokens in one pass of a small model that reads the target's features (arXiv 2602.06036).

The block is the root, and mask tokens at the positions after it. The output at a mask token predicts the token there. A
layer's queries are the block's. Its keys and values are the block's and the context's, which are all positions before
the root. Each layer makes the context's of the target's features, projected and normalised; they are cached.

With a causal block (JetSpec, arXiv 2606.18394) a token of the block sees those before it, and otherwise all of them. A
window counts positions of the context from the token's own, and hides no token of the block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from eagle_jax.drafts.by_depth import grow_by_depth
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.models.architectures import WINDOWS, config_of
from eagle_jax.models.cache import KVCache, NewKV
from eagle_jax.models.config import LlamaConfig, require_same
from eagle_jax.models.fields import ConfigError, flag, layer_indices, refuse_unknown_mathematics, require_equal, size
from eagle_jax.models.layers import AttendLayer, norm_weight, normal, normed
from eagle_jax.models.llama import DecoderLayer
from eagle_jax.models.rope import Rotation, rope_angles
from eagle_jax.models.target import Target
from eagle_jax.ops.attention import attention
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN
from eagle_jax.tree import TreePolicy

OWN = "dflash_config"
CAUSAL = ("causal", "causal_head")  # DFlash's name and JetSpec's
OUTPUTS, INPUTS = "target_layer_ids", "aux_hidden_state_layer_ids"  # the tapped layers' outputs, and their inputs
MASK, TWO_WAYS, FROM_ROOT, SOME = "mask_token_id", "sliding_window_non_causal", "sample_from_anchor", "draft_vocab_size"
# What a config.json states of a block, in `dflash_config` or at the top level; all else is of the layers.
READ_OWN = (
    *(MASK, OUTPUTS, INPUTS, TWO_WAYS, FROM_ROOT, SOME),
    *("block_size", "num_target_layers", "target_hidden_size", "use_swa", "swa_window_size"),
    *CAUSAL,
)
# Fields of a block by values that change nothing; others make descendants of DFlash (Domino, DSpark). `is_causal` is
# the flag of a library's attention, whatever the mask.
NEUTRAL_OWN: dict[str, tuple[Any, ...]] = {
    "projector_type": ("dflash",),
    "markov_rank": (0,),
    "enable_confidence_head": (False,),
    "is_causal": (False,),
}


@dataclasses.dataclass(frozen=True)
class DFlashConfig(LlamaConfig):
    """The sizes of a DFlash head: its decoder layers, Qwen3's in published heads, and what it reads.

    block_size: the root and the mask tokens after it that the head was trained on. A shorter block will do, too.
    mask_token_id: the target's token that stands for one to predict.
    taps: the target's layers whose *input* is read.
    causal: whether a token of the block sees only those before it. causal_windows: the same in layers with a window
      alone, as speculators and SpecForge train them.
    num_target_layers: of the target that the head was trained for; 0 if its config does not say.
    own_embedding, own_lm_head: whether the head's checkpoint holds its own; if not, it uses the target's.
    draft_vocab_size: entries of its own lm_head, which are tokens that the head drafts; 0: all tokens.
    from_root: whether the output at the root predicts the token after it, and that at a mask token the one after that.
    """

    block_size: int = 16
    mask_token_id: int = 0
    taps: tuple[int, ...] = ()
    causal: bool = False
    num_target_layers: int = 0
    own_embedding: bool = False
    own_lm_head: bool = False
    _: dataclasses.KW_ONLY
    causal_windows: bool = False
    draft_vocab_size: int = 0
    from_root: bool = False

    @property
    def deepest(self) -> int:
        """The deepest tree that a block can grow."""
        return self.block_size if self.from_root else self.block_size - 1

    def is_causal(self, layer: int) -> bool:
        """Returns whether a token of the block sees only those before it, in a layer."""
        return self.causal or (self.causal_windows and self.window_of(layer) is not None)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json", **own: Any) -> DFlashConfig:
        """Reads the config.json of a head as its authors publish them, and JetSpec its own.

        `target_layer_ids` names layers whose *output* is read there, so a tap is an id + 1.

        Args:
          own: `own_embedding` and `own_lm_head`, from the checkpoint's tensor names.
        Raises:
          ConfigError: naming a field that is missing, contradicts another, or is not implemented.
        """
        return cls(**block_fields(flat_fields(hf, where, READ_OWN, NEUTRAL_OWN), where, **own))

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json as DFlash's authors publish them, which `from_hf` reads.

        Raises:
          ConfigError: naming what such a config cannot state, as its layers are Qwen3's.
        """
        top = self.own_fields()
        if INPUTS in top:
            raise ConfigError(f"a config.json of a DFlash head names outputs of layers; it taps {list(self.taps)}")
        own = {name: top.pop(name) for name in (MASK, OUTPUTS, "causal") if name in top}
        if self.causal:
            own |= dict.fromkeys(CAUSAL, True)
        hf = {"architectures": ["DFlashDraftModel"]} | self.layer_fields() | top | {OWN: own}
        self.require_stated(hf)
        return hf

    def require_stated(self, hf: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming what differs, unless `from_hf` reads this config in a config.json."""
        own = {"own_embedding": self.own_embedding, "own_lm_head": self.own_lm_head}
        read = type(self).from_hf(hf, "the config.json of this head", **own)
        lost = [
            field.name for field in dataclasses.fields(self) if getattr(read, field.name) != getattr(self, field.name)
        ]
        if lost:
            values = ", ".join(f"{name} = {getattr(self, name)!r}" for name in lost)
            raise ConfigError(f"a config.json of a DFlash head cannot state {values}")

    def layer_fields(self) -> dict[str, Any]:
        """Returns what a config.json states of the decoder layers, which are Qwen3's."""
        hf: dict[str, Any] = {
            "model_type": "qwen3",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if windows := [window for window in self.windows if window is not None]:
            kinds = ["full_attention" if window is None else "sliding_attention" for window in self.windows]
            hf |= {"use_sliding_window": True, "sliding_window": max(windows), "layer_types": kinds}
        return hf

    def own_fields(self) -> dict[str, Any]:
        """Returns what a config.json states of the block, under the names that `from_hf` reads.

        Where there are windows, it says whether their layers are causal, because readers differ on the default.
        """
        fields: dict[str, Any] = {"block_size": self.block_size, MASK: self.mask_token_id}
        fields |= {INPUTS: list(self.taps)} if 0 in self.taps else {OUTPUTS: [tap - 1 for tap in self.taps]}
        if self.causal_windows and not self.causal:
            fields[TWO_WAYS] = False
        elif self.causal or any(self.windows):
            fields["causal"] = self.causal
        if self.num_target_layers:
            fields["num_target_layers"] = self.num_target_layers
        if self.draft_vocab_size:
            fields[SOME] = self.draft_vocab_size
        if self.from_root != type(self).from_root:
            fields[FROM_ROOT] = self.from_root
        return fields


def flat_fields(
    hf: Mapping[str, Any], where: str, reads: tuple[str, ...], neutral: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Returns the fields of a config.json, with those of `dflash_config` at the top level.

    Args:
      reads: the fields that the caller reads of `dflash_config`. neutral: values that change nothing of others.
    Raises:
      ConfigError: for an unknown field of `dflash_config`, a value that is not implemented, or two that contradict.
    """
    nested = hf.get(OWN)
    if nested is not None and not isinstance(nested, Mapping):
        raise ConfigError(f"{where}: {OWN} must be an object, got {nested!r}; the file is damaged")
    flat = {name: value for name, value in hf.items() if name != OWN}
    for place, fields in ((f"{OWN}.", nested or {}), ("", flat)):
        refuse_unknown_mathematics(fields, neutral, where, place, reads=(*reads, *WINDOWS))
    for name, value in (nested or {}).items():
        if name not in reads and name not in neutral:
            raise ConfigError(f"{where}: {OWN}.{name} is not known, so that it may change the forward pass")
        stated = {name: flat.get(name), f"{OWN}.{name}": value}
        flat[name] = require_equal({place: value for place, value in stated.items() if value is not None}, where)
    return {name: value for name, value in flat.items() if name not in neutral}


def block_fields(hf: Mapping[str, Any], where: str, from_root: bool = False, **own: Any) -> dict[str, Any]:
    """Reads the fields of a DFlashConfig by name, from `flat_fields`.

    Args:
      from_root: where the config does not say.
      own: `own_embedding` and `own_lm_head`.
    """
    decoder = {name: value for name, value in hf.items() if name not in READ_OWN}
    if flag(hf, "use_swa", where):
        window = size(f"{OWN}.swa_window_size", hf.get("swa_window_size"), where)
        kinds = ["sliding_attention"] * size("num_hidden_layers", hf.get("num_hidden_layers"), where)
        decoder |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    taps = _taps(hf, where)
    fields = vars(config_of(decoder, where))
    vocabulary, mask = fields["vocab_size"], hf.get(MASK)
    if type(mask) is not int or not 0 <= mask < vocabulary:
        raise ConfigError(f"{where}: {OWN}.{MASK} must be a token id, got {mask!r}")
    require_equal({n: hf[n] for n in ("hidden_size", "target_hidden_size") if hf.get(n) is not None}, where)
    causal = require_equal({name: flag(hf, name, where) for name in CAUSAL if hf.get(name) is not None}, where)
    one_way = any(fields["windows"]) and not flag(hf, TWO_WAYS, where, default=True)
    if one_way and causal is False:
        raise ConfigError(f"{where}: {TWO_WAYS} = False and causal = False contradict each other; keep one")
    layers, some = (0 if hf.get(name) is None else size(name, hf[name], where) for name in ("num_target_layers", SOME))
    own_lm_head = own.pop("own_lm_head", False) or some not in (0, vocabulary)
    return fields | dict(
        block_size=size("block_size", hf.get("block_size"), where),
        mask_token_id=mask,
        taps=taps,
        causal=bool(causal),
        causal_windows=one_way and not causal,
        num_target_layers=layers,
        draft_vocab_size=0 if some == vocabulary else some,
        from_root=flag(hf, FROM_ROOT, where, default=from_root),
        own_lm_head=own_lm_head,
        **own,
    )


def _taps(hf: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Reads the layers whose input is tapped: the output of layer i is the input of layer i + 1."""
    named = {name: layer_indices(name, hf.get(name) or (), where) for name in (OUTPUTS, INPUTS)}
    stated = {name: tuple(id + (name == OUTPUTS) for id in ids) for name, ids in named.items() if ids}
    if not stated:
        raise ConfigError(f"{where}: {OWN}.{OUTPUTS} is missing, so which layers are read cannot be known")
    if len(set(stated.values())) > 1:
        raise ConfigError(f"{where}: {OUTPUTS} and {INPUTS} name different layers: inputs of {stated}; keep one")
    return stated.popitem()[1]


def spaced_taps(target_layers: int, layers: int) -> tuple[int, ...]:
    """Returns the taps of published heads: as many as the head has layers, evenly spaced.

    They are the outputs of the target's layers from the second to the third from the end; of the middle one for a head
    of one layer. A target with fewer layers has each tap once.
    """
    last = max(target_layers - 3, 1)
    outputs = [target_layers // 2] if layers == 1 else [round(1 + i * (last - 1) / (layers - 1)) for i in range(layers)]
    return tuple(sorted({min(output, target_layers - 1) + 1 for output in outputs}))


class DFlash(Draft, nnx.Module):
    """Drafts a block in one pass, and grows a tree from its logits. The memory is the cache of the context.

    The embedding and the output matrix are the target's, unless the head has its own.
    """

    def __init__(self, config: DFlashConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Initialises random weights."""
        keys = jax.random.split(key, config.num_layers + 1)
        d = config.hidden_size
        self.config = config
        self.fc = Weight(normal(keys[0], (d, len(config.taps) * d), dtype))
        self.hidden_norm = norm_weight(config, d, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, layer_key, dtype, index=index) for index, layer_key in enumerate(keys[1:])]
        )
        self.norm = norm_weight(config, d, dtype)
        # None: the target's.
        more = jax.random.split(jax.random.fold_in(key, 0))
        self.embed = nnx.Param(normal(more[0], (config.vocab_size, d), dtype)) if config.own_embedding else None
        some = config.draft_vocab_size
        self.lm_head = Weight(normal(more[1], (some or config.vocab_size, d), dtype)) if config.own_lm_head else None
        # Target id of every draft id; None if the vocabularies are the same.
        self.target_ids = nnx.Variable(jnp.arange(some, dtype=jnp.int32)) if some else None

    @property
    def dtype(self) -> Any:
        return self.fc.dtype

    @property
    def reusable(self) -> bool:
        return not self.config.rope.by_length

    def taps(self, target: Target) -> tuple[int, ...]:
        return self.config.taps

    def check_fits(self, target: Target) -> None:
        config = self.config
        for field in ("vocab_size", "hidden_size"):
            require_same(field, getattr(config, field), getattr(target.config, field))
        layers = target.config.num_layers
        if config.num_target_layers:
            require_same("num_target_layers", config.num_target_layers, layers)
        if max(config.taps) > layers:
            raise ConfigError(
                f"the draft does not fit the target: it taps layer {max(config.taps)}, the target has {layers} layers"
            )

    def check_depth(self, tree: TreePolicy) -> None:
        """Raises ValueError for a tree deeper than a block."""
        block, deepest = self.config.block_size, self.config.deepest
        if tree.depth > deepest:
            raise ValueError(
                f"a tree of depth {tree.depth} needs a block of {tree.depth + block - deepest}; this head was trained "
                f"on blocks of {block}: choose a tree of depth {deepest} or less"
            )

    def start(self, target: Target, batch: int, rows: int) -> KVCache:
        return KVCache.zeros(self.config, batch, rows, self.dtype)

    def update(self, target: Target, memory: KVCache, committed: Committed) -> KVCache:
        """Caches keys and values of the newly committed positions."""
        assert committed.output.taps is not None
        positions = committed.start[:, None] + jnp.arange(committed.tokens.shape[1], dtype=jnp.int32)[None]
        rotation = rope_angles(self.config.rope, self.config.head_dim, positions, committed.prompt_lengths)
        new_kv = self.context(committed.output.taps, rotation)
        return memory.write(new_kv, committed.start).with_length(committed.start + committed.count)

    def context(self, features: Float[Array, "batch new features"], rotation: Rotation) -> NewKV:
        """Returns the keys and values that each layer makes of the target's features."""
        with jax.named_scope("fc"):
            fused = linear(features.astype(self.dtype), self.fc)
            context = normed(fused, self.hidden_norm, self.config)
        return [layer.attention.keys_and_values(context, rotation) for layer in self.layers]

    def run_block(
        self, target: Target, tokens: Int[Array, "batch new"], rotation: Rotation, attend: AttendLayer
    ) -> Float[Array, "batch new hidden"]:
        """Runs the tokens of one or several blocks, and returns the normalised outputs. `attend` knows the context."""
        config = self.config
        with jax.named_scope("embed"):
            x = (target.embed if self.embed is None else self.embed)[tokens].astype(self.dtype)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{index}"):
                x, _ = layer(x, rotation, functools.partial(attend, index), config.attention_spec(index))
        return normed(x, self.norm, config)

    def block_logits(
        self,
        target: Target,
        memory: KVCache,
        root: Int[Array, " batch"],
        size: int,
        prompt_lengths: Int[Array, " batch"],
    ) -> Float32[Array, "batch depth draft_vocab"]:
        """Runs a block of `size` tokens, and returns the logits of the tokens that it drafts, one a depth."""
        hidden = self.block_hidden(target, memory, root, size, prompt_lengths)
        return self.logits(target, hidden[:, self.first_output :])

    @property
    def first_output(self) -> int:
        """The first token of a block whose output predicts one: the root, or the mask token after it."""
        return 0 if self.config.from_root else 1

    def logits(
        self, target: Target, hidden: Float[Array, "batch new hidden"]
    ) -> Float32[Array, "batch new draft_vocab"]:
        """Returns the logits of normalised outputs of a block."""
        if self.lm_head is None:
            return target.logits(hidden.astype(target.dtype))
        with jax.named_scope("lm_head"):
            return linear(hidden, self.lm_head, jnp.float32)

    def block_hidden(
        self,
        target: Target,
        memory: KVCache,
        root: Int[Array, " batch"],
        size: int,
        prompt_lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch size hidden"]:
        """Runs a block of `size` tokens, and returns its normalised outputs."""
        config, batch = self.config, len(root)
        masks = jnp.full((batch, size - 1), config.mask_token_id, root.dtype)
        tokens = jnp.concatenate([root[:, None], masks], axis=1)
        positions = memory.length[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        rotation = rope_angles(config.rope, config.head_dim, positions, prompt_lengths)

        def attend(index, q, k, v, spec=PLAIN):
            seen = jnp.tri(size, dtype=bool) if config.is_causal(index) else jnp.ones((size, size), bool)
            mask = jnp.broadcast_to(seen, (batch, size, size))
            context = memory.layer(index)
            return attention(q, k, v, mask, context, spec=spec, positions=positions, limit_new=False), None

        return self.run_block(target, tokens, rotation, attend)

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Grows a tree in which all nodes of one depth have the same candidates for children.

        Raises:
          ValueError: for a tree deeper than a block.
        """
        self.check_depth(tree)
        size = tree.depth + self.first_output
        logits = self.block_logits(target, context.memory, context.root, size, context.prompt_lengths)
        ids = None if self.target_ids is None else self.target_ids[...]
        return grow_by_depth(context, tree, logits, noise, ids)
