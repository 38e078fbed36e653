"""A training step of an EAGLE-3 head in plain eager PyTorch, with autograd and nothing saved or fused by hand.

The official loss: every position of a step counts, answers past the end are logits of zero, and the losses of the steps
weigh DECAY ** k. Autograd keeps the activations of all steps.

Letters: B batch, S positions, N heads, H head dim, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eagle_jax.models import params

RATE, BETAS, EPSILON, CLIP, DECAY = 5e-5, (0.9, 0.95), 1e-8, 0.5, 0.8
FROZEN = ("embed", "target_ids")


class Eager:
    """Takes a step at every call, on `tokens` [B, S] without padding; returns its loss."""

    def __init__(self, target: Any, draft: Any, tokens: np.ndarray, steps: int):
        import torch

        torch.set_num_threads(1)
        self.torch, self.steps, self.width = torch, steps, tokens.shape[1]
        self.base, self.head = (
            {path: torch.from_numpy(np.array(array)) for path, array in params.flatten(model).items()}
            for model in (target, draft)
        )
        self.target_config, self.config, self.taps = target.config, draft.config, draft.taps(target)
        self.vocabulary = self.head["target_ids"].long()
        self.known = torch.zeros(target.config.vocab_size).index_fill(0, self.vocabulary, 1.0)
        self.ids = torch.from_numpy(tokens).long()
        self.causal = torch.ones(self.width, self.width, dtype=torch.bool).tril()
        self.trained = [array.requires_grad_() for path, array in self.head.items() if path not in FROZEN]
        self.optimizer = torch.optim.AdamW(self.trained, RATE, BETAS, EPSILON, weight_decay=0.0)

    def __call__(self) -> float:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        return loss.item()

    def loss(self) -> Any:
        functional = self.torch.nn.functional
        with self.torch.no_grad():
            features, logits = self.target_pass()
            answers = self.shifted(logits[..., self.vocabulary].softmax(-1), 1, 1 / len(self.vocabulary))
            mask = self.known[self.shifted(logits.argmax(-1), 1)]
        hidden = functional.linear(features, self.head["fc"])
        keys: list[Any] = []
        values: list[Any] = []
        total = 0.0
        for step in range(self.steps):
            hidden = self.draft_step(hidden, step, keys, values)
            normed = self.norm(hidden, self.head["norm"], self.config)
            log_q = functional.linear(normed, self.head["lm_head"]).log_softmax(-1)
            losses = (self.shifted(answers, step) * log_q).sum(-1) * self.shifted(mask, step)
            total = total - DECAY**step * losses.mean()
        return total

    def target_pass(self) -> tuple[Any, Any]:
        """Returns the taps [B, S, F] and the logits [B, S, V]."""
        config, weights = self.target_config, self.base
        hidden, taps = weights["embed"][self.ids], []
        for index in range(config.num_layers):
            if index in self.taps:
                taps.append(hidden)
            path = f"layers.{index}"
            normed = self.norm(hidden, weights[f"{path}.input_norm"], config)
            q, k, v = self.projected(weights, path, normed, 0, config)
            hidden = hidden + self.mixed(weights, path, self.attended(q, [k], [v]))
            hidden = hidden + self.mlp(weights, path, self.norm(hidden, weights[f"{path}.post_attention_norm"], config))
        output = weights["lm_head"] if "lm_head" in weights else weights["embed"]
        logits = self.torch.nn.functional.linear(self.norm(hidden, weights["norm"], config), output)
        return self.torch.cat(taps, -1), logits

    def draft_step(self, hidden: Any, step: int, keys: list[Any], values: list[Any]) -> Any:
        """Runs step `step` of the training-time test; appends its keys and values."""
        config, weights = self.config, self.head
        tokens = self.shifted(self.ids, step + 1)
        embedding = self.norm(self.base["embed"][tokens], weights["layer.input_norm"], config)
        x = self.torch.cat([embedding, self.norm(hidden, weights["layer.hidden_norm"], config)], -1)
        q, k, v = self.projected(weights, "layer", x, step, config)
        keys.append(k)
        values.append(v)
        hidden = hidden + self.mixed(weights, "layer", self.attended(q, keys, values))
        return hidden + self.mlp(weights, "layer", self.norm(hidden, weights["layer.post_attention_norm"], config))

    def attended(self, q: Any, keys: list[Any], values: list[Any]) -> Any:
        """Attends causally to the first keys, and to the position's own of the others: [B, N, S, H]."""
        first = (q @ keys[0].transpose(-1, -2)).masked_fill(~self.causal, -self.torch.inf)
        own = [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
        weights = (self.torch.cat([first, *own], -1) * q.shape[-1] ** -0.5).softmax(-1)
        out = weights[..., : self.width] @ values[0]
        for place, value in enumerate(values[1:], self.width):
            out = out + weights[..., place : place + 1] * value
        return out

    def projected(self, weights: dict[str, Any], path: str, x: Any, step: int, config: Any) -> tuple[Any, Any, Any]:
        """Returns q, k and v, [B, N, S, H] each, rotated to positions from `step` on."""

        def heads(name: str) -> Any:
            weight = weights[f"{path}.attention.{name}"]
            out = self.torch.nn.functional.linear(x, weight.flatten(0, 1))
            return out.unflatten(-1, weight.shape[:2]).transpose(1, 2)

        half = config.head_dim // 2
        positions = self.torch.arange(step, step + self.width)
        angles = positions[:, None] * config.rope.theta ** (-self.torch.arange(half) / half)
        cos, sin = angles.cos(), angles.sin()

        def rotated(values: Any) -> Any:
            left, right = values[..., :half], values[..., half:]
            return self.torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

        groups = config.num_heads // config.num_kv_heads
        k, v = (values.repeat_interleave(groups, 1) for values in (rotated(heads("k")), heads("v")))
        return rotated(heads("q")), k, v

    def mixed(self, weights: dict[str, Any], path: str, out: Any) -> Any:
        return self.torch.nn.functional.linear(out.transpose(1, 2).flatten(2), weights[f"{path}.attention.o"])

    def mlp(self, weights: dict[str, Any], path: str, x: Any) -> Any:
        functional = self.torch.nn.functional
        gate, up = (functional.linear(x, weights[f"{path}.mlp.{name}"]) for name in ("gate", "up"))
        return functional.linear(functional.silu(gate) * up, weights[f"{path}.mlp.down"])

    def norm(self, x: Any, weight: Any, config: Any) -> Any:
        return self.torch.nn.functional.rms_norm(x, weight.shape, weight, config.rms_norm_eps)

    def shifted(self, values: Any, count: int, fill: float = 0) -> Any:
        """Shifts [B, S, ...] left by `count`; fills with `fill`."""
        rest = values.new_full((len(values), count, *values.shape[2:]), fill)
        return self.torch.cat([values[:, count:], rest], 1)
