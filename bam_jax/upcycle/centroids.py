"""Routers that start toward the sources' data instead of at random.

A domain's text lies closer to the mean of its own embeddings than to another domain's: that is how
c-BTM (arXiv 2303.14177) chooses among experts, and how FlexOlmo (arXiv 2507.07024) starts its
router's columns. Here the embeddings are the router's own inputs, the normalised block inputs of
the averaged dense model, so that every layer gets a router of its own.

Legend: S sources, L layers, B batch, T sequence, D model, E experts.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.data import mixture
from bam_jax.errors import UserError
from bam_jax.model import parameters, transformer
from bam_jax.parallel import processes, sharding
from bam_jax.parallel.collectives import Layout

CENTROID_TOKENS = 32_768  # read of each source's data, rounded up to whole batches
COPY_SPREAD = 0.1  # how far copies' columns are turned from the first source's


def routers(
  network: transformer.Network,
  params: transformer.Params,
  batches: Sequence[Iterable[mixture.Batch]],
  mesh: jax.sharding.Mesh,
  paths: Sequence[str],
  upcycle: config.Upcycle,
  key: jax.Array,
) -> dict[str, np.ndarray]:
  """The routers LDE of a mixture, by path.

  Args:
    network: the dense model.
    params: its parameters, averaged over the sources as the mixture averages; NumPy arrays.
    batches: for each source a few batches of its training data, this process's rows of each.
    mesh: the mixture's; each of its devices holds the dense model whole for a moment.
    paths: the routers' paths.
    upcycle: the number of experts and `router_scale`, the length of a column.
    key: for the columns of copies.
  """
  sums = _input_sums(network, mesh)
  dtype = jnp.dtype(network.compute.dtype)
  params = parameters.cast(params, dtype)
  params = processes.put(params, jax.tree.map(lambda _: NamedSharding(mesh, P()), params))
  means_SLD = np.stack([_mean(sums, params, source, mesh) for source in batches])
  return {path: columns(means_SLD, path, upcycle, key) for path in paths}


def columns(
  means_SLD: np.ndarray, path: str, upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """A router LDE from the mean inputs of every source's tokens.

  Column i points from the mean over the sources toward source i's. A router has no bias, so the
  part along the mean over the sources would favour one expert for every token alike: it is taken
  out, and the sources' mean token finds all gates equal. All columns have the length
  `router_scale`, on average that of a random router's: with equal lengths the mean token of each
  source has its largest logit at its own expert, in every layer, however close the domains are.

  A copy's column is the first source's, turned by about COPY_SPREAD radians in a random direction:
  equal columns would tie, and ties go to the lower expert.
  """
  means_SLD = means_SLD.astype(np.float64)
  common_LD = means_SLD.mean(0)
  common_LD /= np.linalg.norm(common_LD, axis=-1, keepdims=True)

  def unit(x_ELD):
    x_ELD = x_ELD - np.sum(x_ELD * common_LD, -1, keepdims=True) * common_LD
    return x_ELD / np.linalg.norm(x_ELD, axis=-1, keepdims=True)

  away_SLD = means_SLD - means_SLD.mean(0)
  if (np.abs(away_SLD).max(-1) <= 1e-6 * np.abs(means_SLD).max(-1)).any():
    raise UserError(
      f"router_init='centroids' finds no difference between the data of from="
      f"{list(upcycle.sources)}: give the sources different data, or set router_init='random'."
    )
  own_SLD = unit(away_SLD)
  words = np.asarray(jax.random.key_data(key)).tolist()
  rng = np.random.default_rng([*words, zlib.crc32(path.encode())])
  turns = [unit(rng.standard_normal(own_SLD[:1].shape)) for _ in upcycle.copies]
  copies = [unit(own_SLD[:1] + COPY_SPREAD * turn) for turn in turns]
  columns_ELD = np.concatenate([own_SLD, *copies])
  return (upcycle.router_scale * columns_ELD).transpose(1, 2, 0).astype(np.float32)


def _mean(sums: Callable, params, batches: Iterable[mixture.Batch], mesh) -> np.ndarray:
  """The mean input LD of every block over the real tokens of the batches."""
  total_LD, tokens = 0.0, 0.0
  for batch in batches:
    arrays = sharding.put_batch(mixture.model_inputs(batch), mesh)
    part_LD, part = sums(params, arrays['tokens'], arrays['segments'], arrays['positions'])
    total_LD, tokens = total_LD + np.asarray(part_LD, np.float64), tokens + float(part)
  return total_LD / tokens


def _input_sums(network: transformer.Network, mesh: jax.sharding.Mesh) -> Callable:
  """The function (params, tokens, segments, positions) -> sums of inputs LD, number of tokens."""
  model, compute = network.model, network.compute
  # Whole on every device, over global arrays: nothing here may be written for a device's part.
  build = lambda: transformer.Transformer(model, compute, Layout(), rngs=nnx.Rngs(0))
  graph, _ = nnx.split(nnx.eval_shape(build))

  def sums(params, tokens_BT, segments_BT, positions_BT):
    dense = nnx.merge(graph, params)
    x_BTD = dense.embed.table[tokens_BT]
    tokens = dense.tokens(segments_BT, positions_BT)
    real_BT = segments_BT > 0
    block_graph, layers = nnx.split(dense.blocks)

    def layer(x_BTD, layer_params):
      block = nnx.merge(block_graph, layer_params)
      sum_D = jnp.einsum('btd,bt->d', block.norm(x_BTD), real_BT.astype(jnp.float32))
      return block(x_BTD, tokens)[0], sum_D

    return jax.lax.scan(layer, x_BTD, layers)[1], real_BT.sum()

  return jax.jit(sums, out_shardings=NamedSharding(mesh, P()))
