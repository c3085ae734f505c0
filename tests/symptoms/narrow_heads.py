"""Value and gradient of attention with 4 narrow heads, compiled for one v5e chip: temporary memory (needs jax[tpu]).

PYTHONPATH=CHECKOUT python tests/symptoms/narrow_heads.py
"""

import os

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")

from jax.experimental import topologies

from moe import config, layers, sharding
from moe.kernels import attention

chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
mesh = sharding.make_mesh(config.Mesh(), chip)
placed = jax.NamedSharding(mesh, jax.P())


def loss(q, k, v, ids, positions):
  bias = layers.attention_bias(positions, positions, ids, ids, 0)
  out = attention.attention(q, k, v, bias, ids, scale=0.25, softcap=0.0, window_tokens=0)
  return jnp.sum(out.astype(jnp.float32))


for length, width in ((2048, 16), (8192, 16), (32768, 16), (8192, 80), (8000, 64)):
  heads = jax.ShapeDtypeStruct((1, length, 4, width), jnp.bfloat16, sharding=placed)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=placed)
  try:
    with jax.set_mesh(mesh):
      compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(heads, heads, heads, ids, ids).compile()
  except jax.errors.JaxRuntimeError as error:
    print(f"{length} tokens, heads of {width}: does not compile: {' '.join(str(error).split())[:200]}", flush=True)
    continue
  megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
  kernel = "splash" if "splash" in compiled.as_text() else "plain"
  print(f"{length} tokens, heads of {width}: {megabytes:,.1f} MB of temporaries, {kernel} kernel", flush=True)
