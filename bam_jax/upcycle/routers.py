"""Routers fitted to the sources' data instead of drawn at random.

Two ways, both from what a router reads of every source's tokens. 'centroids': c-BTM (arXiv
2303.14177) routes by the mean embedding of each domain, and FlexOlmo (arXiv 2507.07024) initialises
its router's columns with it. 'ridge': DUME (arXiv 2603.29765) regresses the number of the source on
what the router reads, which also allows for directions in which tokens vary whatever their source.

Here every layer gets routers of its own, from what the part beside the router reads: in the
averaged dense model, whose parallel blocks feed both parts the same; a sequential block's FFN reads
the sum with attention's output, so that its routers are fitted in a mixture with such routers,
whose attention is its own.

Legend: S sources, L layers, B batch, T sequence, D model, E experts, C copies.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.data import mixture
from bam_jax.errors import UserError
from bam_jax.model import block, router, transformer
from bam_jax.parallel import sharding
from bam_jax.upcycle import outputs, rules
from bam_jax.upcycle.merge import Merge, generator

FIT_TOKENS = 32_768  # read of each source's data, rounded up to whole batches
RIDGE = 0.1  # penalty, as a share of the mean square of a channel; 0.001 to 0.3 did as well
COPY_SPREAD = 0.1  # of copies around the first source's column, as a share of it


class Moments(NamedTuple):
  """Of what a router reads over each source's tokens, float64."""

  mean_SLD: np.ndarray
  gram_LDD: np.ndarray  # mean of x x^T in which every source counts alike; LD0 for 'centroids'


def fit(
  merge: Merge,
  model: config.Model,
  batches: Sequence[Iterable[mixture.Batch]],
  mesh: jax.sharding.Mesh,
  compute: config.Compute,
) -> dict[str, np.ndarray]:
  """The routers LDE, float32, by path, of the mixture `model`; all processes must call.

  `batches` has for each source a few batches of its data, this process's rows of each. The devices
  of the mesh hold the dense average; then, for sequential blocks with attention experts, the
  mixture too.
  """
  upcycle = merge.upcycle

  def read(merge: Merge, model: config.Model) -> block.Routing:
    network = transformer.Network(model, compute, mesh)
    abstract = network.abstract()
    params = outputs.to_mesh(merge, abstract, sharding.tree(abstract, mesh))
    return moments(network, params, batches, mesh, upcycle)

  average = dict(average=upcycle.average, weights=upcycle.weights)
  soup = merge._replace(upcycle=config.Upcycle(upcycle.sources, 'average', **average))
  found = read(soup, merge.sources[0].meta.model)
  fitted = from_moments(found, model, upcycle, merge.key)
  if reads_mixture(model):
    own = read(merge._replace(routers=fitted), model.dropless())
    fitted = from_moments(found._replace(ffn=own.ffn), model, upcycle, merge.key)
  return fitted


def reads_mixture(model: config.Model) -> bool:
  """Whether FFN experts read what the mixture's own attention has added to."""
  return bool(model.block == 'sequential' and model.attention_experts and model.ffn_experts)


def moments(
  network: transformer.Network,
  params: transformer.Params,
  batches: Sequence[Iterable[mixture.Batch]],
  mesh: jax.sharding.Mesh,
  upcycle: config.Upcycle,
) -> block.Routing:
  """The Moments of what the routers beside each layer's two parts read.

  The network is dense, or of sequential blocks; its parameters lie on the mesh as in training.
  Sums over a batch are float32, those over batches float64.
  """
  layout, keys = network.layout, ('tokens', 'segments', 'positions')

  def sums(y_BTD, tokens, counted_BT):
    # The sum of x, and for the regression of x x^T beside it: D(1+D).
    x_BTD = y_BTD.astype(jnp.float32)
    if upcycle.router_input == 'prefix':
      x_BTD, _ = router.prefix_mean(x_BTD, tokens, upcycle.router_memory)
    x_BTD = jnp.where(counted_BT[..., None], x_BTD, 0)
    times_BTX = jnp.ones_like(x_BTD[..., :1])
    if upcycle.router_init == 'ridge':
      times_BTX = jnp.concatenate([times_BTX, x_BTD], axis=-1)
    return jnp.einsum('btd,btx->dx', x_BTD, times_BTX, precision=jax.lax.Precision.HIGHEST)

  def local(params, batch):
    _, routing = network.hidden(params, *map(batch.get, keys), collect=sums)
    return layout.total((jnp.stack(routing), jnp.sum(batch['segments'] > 0)))

  step = jax.jit(layout.spread(local, (sharding.specs(network.abstract()), sharding.BATCH), P()))
  L, D = network.model.num_layers, network.model.d_model
  X = 1 + D if upcycle.router_init == 'ridge' else 1
  means, grams_2LDX = [], np.zeros((2, L, D, X - 1))
  for source in batches:
    total_2LDX, tokens = np.zeros((2, L, D, X)), 0  # added to in place: at 7B it has 9 GB
    for batch in source:
      part_2LDX, part = step(params, sharding.put_batch(batch, mesh))
      total_2LDX += np.asarray(part_2LDX)
      tokens += int(part)
    total_2LDX /= tokens
    means.append(total_2LDX[..., 0].copy())
    total_2LDX /= len(batches)
    grams_2LDX += total_2LDX[..., 1:]
  return block.Routing(*map(Moments, np.stack(means, axis=1), grams_2LDX))


def from_moments(
  found: block.Routing, model: config.Model, upcycle: config.Upcycle, key: jax.Array
) -> dict[str, np.ndarray]:
  """A mixture's routers LDE, by path, from what `moments` returns."""
  paths = [rule.target for rule in rules.rules(model) if rule.how == 'router']
  of = {'blocks/attention/router': found.attention, 'blocks/ffn/router': found.ffn}
  # That of the embeddings reads what the first layer's attention reads.
  of['embed/router'] = Moments(found.attention.mean_SLD[:, :1], found.attention.gram_LDD[:1])
  fitted = {path: columns(of[path], path, upcycle, key) for path in paths}
  return {path: x[0] if path == 'embed/router' else x for path, x in fitted.items()}


def columns(found: Moments, path: str, upcycle: config.Upcycle, key: jax.Array) -> np.ndarray:
  """The router LDE, float32, at a path; UserError where two sources cannot be told apart.

  A copy's column is the first source's, changed a little at random: equal columns would tie.
  """
  means_SLD = found.mean_SLD
  away_SLD = means_SLD - means_SLD.mean(0)
  if (np.abs(away_SLD).max(-1) <= 1e-6 * np.abs(means_SLD).max(-1)).any():
    what = f'finds no difference between the data of from={list(upcycle.sources)}'
    fix = "give the sources different data, or set router_init='random'."
    raise UserError(f'router_init={upcycle.router_init!r} {what}: {fix}')
  draws = generator(key, path)
  turns_CLD = draws.standard_normal((len(upcycle.copies), *away_SLD.shape[1:]))
  if upcycle.router_init == 'ridge':
    columns_ELD = ridge(found, away_SLD, turns_CLD)
  else:
    columns_ELD = centroids(found, away_SLD, turns_CLD)
  return (upcycle.router_scale * columns_ELD).transpose(1, 2, 0).astype(np.float32)


def centroids(found: Moments, away_SLD: np.ndarray, turns_CLD: np.ndarray) -> np.ndarray:
  """Columns ELD of length 1, about that of a random router.

  Column i points from the mean over the sources towards source i, without the component along the
  mean, which would favour one expert for all tokens, so that the mean token of each source has its
  largest logit at its own expert. Copies are rotated by about COPY_SPREAD radians.
  """
  common_LD = found.mean_SLD.mean(0)
  common_LD /= np.linalg.norm(common_LD, axis=-1, keepdims=True)

  def unit(x_ELD):
    x_ELD = x_ELD - np.sum(x_ELD * common_LD, -1, keepdims=True) * common_LD
    return x_ELD / np.linalg.norm(x_ELD, axis=-1, keepdims=True)

  own_SLD = unit(away_SLD)
  return np.concatenate([own_SLD, unit(own_SLD[:1] + COPY_SPREAD * unit(turns_CLD))])


def ridge(found: Moments, away_SLD: np.ndarray, turns_CLD: np.ndarray) -> np.ndarray:
  """Columns ELD whose logit is on average 1 higher for tokens of the own source than of others.

  Column i solves the ridge regression on x of [x is of source i] - 1/S, in which every source
  counts alike and the penalty is RIDGE times the mean square of a channel of x:
  (G + penalty) w_i = (mean of source i - mean of all) / S, but for the common factor of a layer's
  columns. Logits of copies differ from the first source's by COPY_SPREAD on average.
  """
  gram_LDD, S = found.gram_LDD, len(away_SLD)
  D = gram_LDD.shape[-1]
  penalty_L = RIDGE * np.trace(gram_LDD, axis1=1, axis2=2) / D
  regularised_LDD = gram_LDD + penalty_L[:, None, None] * np.eye(D)
  own_SLD = np.linalg.solve(regularised_LDD, away_SLD.transpose(1, 2, 0)).transpose(2, 0, 1)
  # Over the sources, the mean of w_i (mean of source i - mean of the others).
  gap_L = np.einsum('sld,sld->l', own_SLD, away_SLD) / (S - 1)
  own_SLD = own_SLD / gap_L[:, None]
  size_CL = np.sqrt(np.einsum('cld,lde,cle->cl', turns_CLD, gram_LDD, turns_CLD, optimize=True))
  return np.concatenate([own_SLD, own_SLD[:1] + COPY_SPREAD * turns_CLD / size_CL[..., None]])
