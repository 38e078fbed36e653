"""What two processes do together: `python -m tests.sharding.worker PORT INDEX FOLDER TASK...`, one for each INDEX.

FOLDER holds target/ and run.json (settings); each writes its report there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

import eagle_jax
from eagle_jax import Eagle3Draft, SamplingConfig, TreeConfig
from eagle_jax.cli.train import join
from eagle_jax.convert import from_pretrained
from eagle_jax.sharding import make_mesh
from eagle_jax.train.config import read_settings
from eagle_jax.train.run.loop import train
from tests.sharding.meshes import on_mesh
from tests.toy import draft_config, scaled
from tests.train.models import VOCAB

AXES = ({"data": 4}, {"data": 1, "tensor": 4})  # the batch over the processes, then the products over them


def generated(folder: Path, axes: dict[str, int]) -> dict[str, Any]:
    """Generates four sequences, greedy and sampled, with a loaded target and a random head."""
    mesh = make_mesh(axes)
    target, _ = from_pretrained(folder / "target", mesh=mesh)
    head = scaled(Eagle3Draft(draft_config(vocab_size=VOCAB), 3, jax.random.key(1)), 6.0)
    out = eagle_jax.generate(
        target,
        on_mesh(head, mesh),
        np.random.default_rng(0).integers(8, VOCAB, (4, 8)).astype(np.int32),
        np.array([8, 1, 5, 3]),
        jax.random.key(2),
        tree=TreeConfig(depth=3, top_k=2, num_nodes=6),
        sampling=SamplingConfig(temperature=np.array([0.0, 0.8, 0.0, 0.8], np.float32)),
        max_new_tokens=12,
    )
    return {name: np.asarray(getattr(out, name)).tolist() for name in ("tokens", "lengths", "accepted")}


def meet() -> None:
    """Connects the processes before they compile: gloo's timeout of 30 s is shorter than a compilation."""
    for axes in ({"data": 4}, {"data": 2, "tensor": 2}):
        mesh = make_mesh(axes)
        spec = PartitionSpec(tuple(axes))
        for axis in axes:
            total = jax.shard_map(
                lambda x, axis=axis: jax.lax.psum(x, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
            )
            jax.block_until_ready(jax.jit(total)(np.ones(4, np.float32)))


def work(folder: Path, tasks: list[str]) -> dict[str, Any]:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if "end" in tasks and "step 2/" in message:
            os.kill(os.getpid(), signal.SIGTERM)  # the first process only; the other is told

    report: dict[str, Any] = {}
    if "generate" in tasks:
        report["texts"] = [generated(folder, axes) for axes in AXES]
    if "train" in tasks:
        report["code"] = train(read_settings(folder / "run.json", tasks[tasks.index("train") + 1 :]), say)
    return report | {"said": said, "processes": jax.process_count()}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    join(f"localhost:{sys.argv[1]},2,{sys.argv[2]}")
    meet()
    made = work(Path(sys.argv[3]), sys.argv[4:])
    (Path(sys.argv[3]) / f"report{sys.argv[2]}.json").write_text(json.dumps(made))
