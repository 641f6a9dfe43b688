"""Tests that cuDNN's attention, by its implementation without a GPU, equals the plain one, also on shards.

`python -m tests.benchmarks.accelerator --rows=attention` compares the kernel itself on a GPU.
"""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from ecdit.config import ConfigError
from ecdit.models import attention
from ecdit.models.config import check_tuned
from ecdit.partitioning import MESH_AXES, abstract_mesh, batch_sharding, logical_spec
from ecdit.tuned.cudnn_attention import cudnn_attention
from tests.models.helpers import close, config, dit, inputs, jit
from tests.runs import tiny
from tests.tuned.test_fused_attention import CASES, arguments, with_gradients

by_xla = functools.partial(cudnn_attention, implementation="xla")


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_attention(case):
    close(with_gradients(by_xla, case), with_gradients(attention.normed_attention, case), 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_on_shards_of_images_and_heads_it_is_the_same(case):
    alone, mesh = with_gradients(by_xla, case), Mesh(np.array(jax.devices()).reshape(1, 1, 2, 2, 2), MESH_AXES)
    *heads, norms, angles, mask = arguments(case)
    heads = jax.device_put(heads, NamedSharding(mesh, logical_spec(("batch", "heads"), "heads")))
    angles, mask = jax.device_put((angles, mask), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jit(by_xla).lower(*heads, norms, angles, mask).compile().as_text()
        close(with_gradients(by_xla, case), alone, 3e-6)
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def model_with_gradients(config):
    """A model's velocity, and the gradients of half the sum of its squares."""
    x, model = inputs(config, 4), dit(config)

    @jit
    def run(params):
        output, backward = jax.vjp(lambda params: model(params).forward(*x, config.num_kept)[0], params)
        return output, backward(output)

    return run(model.params)


def test_a_model_with_it_is_the_same(monkeypatch):
    """In float32, which the config refuses for the kernel: so it takes the plain one's place."""
    plain = model_with_gradients(config(remat="minimal"))
    monkeypatch.setitem(attention.ATTENTIONS, "plain", by_xla)
    close(model_with_gradients(config(remat="minimal")), plain, 2e-5)


def test_the_config_field_chooses_it():
    assert attention.ATTENTIONS["cudnn"] is cudnn_attention
    assert config(attention="cudnn", width=32, dtype="bfloat16", latent_size=64).num_tokens == 1024, "no limit of a TPU"


@pytest.mark.parametrize(
    ("changes", "found"), [({"width": 32}, "float32 and 8"), ({"dtype": "bfloat16"}, "bfloat16 and 4")]
)
def test_what_the_kernel_cannot_do_is_refused(changes, found):
    with pytest.raises(ConfigError, match=rf'attention = .cudnn.: .*not {found}: must be "plain" or "fused"'):
        config(attention="cudnn", **changes)


def test_devices_without_the_kernel_are_refused():
    from ecdit.sampling.sampler import check_sampling

    cudnn = config(attention="cudnn", width=32, dtype="bfloat16")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1), MESH_AXES)
    message = r'config.model.attention = \'cudnn\': must be "plain" or "fused": .* these devices are cpus'
    with pytest.raises(ConfigError, match=message):
        check_sampling(tiny().sampling, dit(cudnn)(dit(cudnn).params), mesh)
    check_tuned(config(), mesh)
    check_tuned(cudnn, abstract_mesh(tiny().mesh, 1))
