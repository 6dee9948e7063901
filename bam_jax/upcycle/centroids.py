"""Routers initialised towards the sources' data instead of at random.

c-BTM (arXiv 2303.14177) routes by the mean embedding of each domain, and FlexOlmo (arXiv
2507.07024) initialises its router's columns with it. Here it is the mean of what the part beside
the router reads, so that every layer gets routers of its own: in the averaged dense model, whose
parallel blocks feed both parts the same; a sequential block's FFN reads the sum with attention's
output, so its means are of a mixture with such routers, whose attention is its own.

Legend: S sources, L layers, B batch, T sequence, D model, E experts.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.data import mixture
from bam_jax.errors import UserError
from bam_jax.model import block, transformer
from bam_jax.parallel import sharding
from bam_jax.upcycle import options, rules

CENTROID_TOKENS = 32_768  # read of each source's data, rounded up to whole batches
COPY_SPREAD = 0.1  # radians by which copies' columns are rotated from the first source's


def mean_inputs(
  network: transformer.Network,
  params: transformer.Params,
  batches: Sequence[Iterable[mixture.Batch]],
  mesh: jax.sharding.Mesh,
) -> block.Routing:
  """The mean of what attention and FFN read in every layer over each source's tokens: SLD, float64.

  The network is dense, or of sequential blocks; its parameters lie on the mesh as in training.
  `batches` has for each source a few batches of its training data, this process's rows of each.
  """
  layout, keys = network.layout, ('tokens', 'segments', 'positions')

  def local(params, batch):
    _, routing = network.hidden(params, *map(batch.get, keys), collect='inputs')
    return layout.total((jnp.stack(routing), jnp.sum(batch['segments'] > 0)))

  sums = jax.jit(layout.spread(local, (sharding.specs(network.abstract()), sharding.BATCH), P()))
  means = []
  for source in batches:
    total_2LD, tokens = 0.0, 0
    for batch in source:
      part_2LD, part = sums(params, sharding.put_batch(batch, mesh))
      total_2LD, tokens = total_2LD + np.asarray(part_2LD, np.float64), tokens + int(part)
    means.append(total_2LD / tokens)
  return block.Routing(*np.stack(means, axis=1))


def routers(
  means: block.Routing, model: config.Model, upcycle: config.Upcycle, key: jax.Array
) -> dict[str, np.ndarray]:
  """A mixture's routers, by path, from what `mean_inputs` returns."""
  paths = [rule.target for rule in rules.rules(model) if rule.how == 'router']
  of = {'blocks/attention/router': means.attention, 'blocks/ffn/router': means.ffn}
  return {path: columns(of[path], path, upcycle, key) for path in paths}


def columns(means_SLD, path: str, upcycle: config.Upcycle, key: jax.Array) -> np.ndarray:
  """The router LDE, float32, at a path, from the mean inputs of every source's tokens.

  Column i points from the mean over the sources towards source i, without the component along the
  mean, which would favour one expert for all tokens. All have length `router_scale`, about that of
  a random router, so that the mean token of each source has its largest logit at its own expert. A
  copy's column is the first source's, slightly rotated at random: equal columns would tie.
  """
  means_SLD = means_SLD.astype(np.float64)
  common_LD = means_SLD.mean(0)
  common_LD /= np.linalg.norm(common_LD, axis=-1, keepdims=True)

  def unit(x_ELD):
    x_ELD = x_ELD - np.sum(x_ELD * common_LD, -1, keepdims=True) * common_LD
    return x_ELD / np.linalg.norm(x_ELD, axis=-1, keepdims=True)

  away_SLD = means_SLD - means_SLD.mean(0)
  if (np.abs(away_SLD).max(-1) <= 1e-6 * np.abs(means_SLD).max(-1)).any():
    found = f'finds no difference between the data of from={list(upcycle.sources)}'
    fix = "give the sources different data, or set router_init='random'."
    raise UserError(f"router_init='centroids' {found}: {fix}")
  own_SLD = unit(away_SLD)
  rng = options.generator(key, path)
  turns = [unit(rng.standard_normal(own_SLD[:1].shape)) for _ in upcycle.copies]
  copies = [unit(own_SLD[:1] + COPY_SPREAD * turn) for turn in turns]
  columns_ELD = np.concatenate([own_SLD, *copies])
  return (upcycle.router_scale * columns_ELD).transpose(1, 2, 0).astype(np.float32)
