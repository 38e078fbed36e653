"""--mesh: models that a command loads lie on the devices it names."""

from __future__ import annotations

import argparse

import pytest

from eagle_jax.cli.options import model_options
from eagle_jax.sharding import mesh_of
from tests.train.chat_templates import byte_level
from tests.train.models import write_target


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    model_options.add_model_arguments(parser)
    model_options.add_decoding_arguments(parser, 8)
    return parser.parse_args(arguments)


def test_models_lie_on_the_mesh(tmp_path):
    folder = str(write_target(tmp_path / "target", byte_level()))
    target = model_options.load_models(parsed("--target", folder, "--mesh", "data=4,tensor=2")).target
    assert parsed("--target", folder, "--mesh", "expert=4,tensor=2").mesh == {"expert": 4, "tensor": 2}
    assert target.embed.sharding.mesh.shape == {"data": 4, "tensor": 2}
    q = target.layers[0].attention.q[...]
    assert q.addressable_shards[0].data.shape == (q.shape[0] // 2, *q.shape[1:])
    assert mesh_of(model_options.load_models(parsed("--target", folder)).target) is None
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        model_options.load_models(parsed("--target", folder, "--mesh", "tensor=16"))


@pytest.mark.parametrize("mesh", ["4", "tensor", "tensor=0", "tensor=x", "fsdp=2", "data=2,data=2", "data=2,"])
def test_a_mesh_that_is_none_is_refused(mesh, capsys):
    with pytest.raises(SystemExit):
        parsed("--target", "x", "--mesh", mesh)
    assert "a mesh is data=2,tensor=4" in capsys.readouterr().err
