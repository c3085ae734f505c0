"""Value and gradient of attention with 4 heads of 16, compiled for one v5e chip: temporary memory."""
# ruff: noqa: E501, UP031


import os

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
from jax.experimental import topologies
from moe import layers
from moe.kernels import attention

devs = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
from jax.sharding import AxisType

mesh = jax.sharding.Mesh(
  devs[:1].reshape(1) if hasattr(devs, "reshape") else __import__("numpy").array(devs[:1]).reshape([1] * 7),
  ("slice", "stage", "data", "fsdp", "expert", "context", "tensor"),
  axis_types=(AxisType.Auto,) * 7,
)
sh = jax.sharding.NamedSharding(mesh, jax.P())
for S, w in ((2048, 16), (8192, 16), (32768, 16), (8192, 80), (8000, 64)):

  def f(q, k, v, ids, pos):
    def loss(q, k, v):
      bias = layers.attention_bias(pos, pos, ids, ids, 0)
      return jnp.sum(attention.attention(q, k, v, bias, ids, scale=0.25, softcap=0.0, window_tokens=0).astype(jnp.float32))

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  q = jax.ShapeDtypeStruct((1, S, 4, w), jnp.bfloat16, sharding=sh)
  ids = jax.ShapeDtypeStruct((1, S), jnp.int32, sharding=sh)
  try:
    with jax.set_mesh(mesh):
      c = jax.jit(f).lower(q, q, q, ids, ids).compile()
    m = c.memory_analysis()
    print(
      "S",
      S,
      "heads of",
      w,
      "temp %.1f MB, peak %.1f MB, splash %s"
      % (m.temp_size_in_bytes / 1e6, m.peak_memory_in_bytes / 1e6, "splash" in c.as_text()),
      flush=True,
    )
  except Exception as e:
    print("S", S, "heads of", w, "FAIL", str(e).replace("\n", " ")[:250], flush=True)
