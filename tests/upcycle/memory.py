"""Dense parameters, in memory or saved, mixed by the real merge and by one spelled out in NumPy."""

import hashlib
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.prepare import training
from bam_jax.upcycle import merge, outputs, rules
from bam_jax.upcycle.sources import Source

KEY = jax.random.key(11)
NAMES = ('seed', 'code', 'law')
ONE_DEVICE = config.Mesh()
TOKENIZER = training.train(['a'], 258)._content


class Reader:
  """Reads arrays that are in memory."""

  def __init__(self, params: dict):
    self.arrays = {path: np.asarray(x) for path, x in flat(params).items()}
    self.specs = {path: arrays.Spec(x.shape, x.dtype) for path, x in self.arrays.items()}

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    return self.arrays[path][index]


def flat(tree: dict) -> dict:
  return traverse_util.flatten_dict(tree, sep='/')


def abstract(model: config.Model) -> dict:
  return transformer.Network(model, config.Compute()).abstract()


def draw(model: config.Model, seed: int, shift: float = 0.0) -> dict:
  """Parameters in NumPy; scales too are random, so that no mean of them is right by luck."""
  rng = np.random.default_rng(seed)
  one = lambda leaf: (rng.normal(size=leaf.shape) + shift).astype(np.float32)
  return jax.tree.map(lambda leaf: one(leaf) / np.float32(leaf.shape[-1] ** 0.5), abstract(model))


def upcycle(method: str, **changes) -> config.Upcycle:
  """Three sources and five experts, so that two are copies; `sparse` has one source."""
  names = NAMES[:1] if method == 'sparse' else NAMES
  default = {} if method == 'average' else {'num_experts': 5}
  return config.Upcycle(names, method, **(default | changes))


def source(dense: config.Model, params: dict, name: str = 'source') -> Source:
  """Parameters in memory, as an opened checkpoint."""
  return Source(name, None, types.SimpleNamespace(model=dense), Reader(params))


def specs(model: config.Model) -> dict[str, arrays.Spec]:
  return outputs.specs(abstract(model))


def mix(
  params: Sequence[dict],
  dense: config.Model,
  upcycle: config.Upcycle,
  key: jax.Array = KEY,
  mesh: config.Mesh = ONE_DEVICE,
  routers: dict[str, np.ndarray] | None = None,
) -> dict:
  """The mixture's parameters on a mesh, as NumPy arrays."""
  sources = [source(dense, one, f'source {number}') for number, one in enumerate(params)]
  target = abstract(rules.mixture_model(dense, upcycle))
  shardings = sharding.tree(target, sharding.make_mesh(mesh))
  mixed = outputs.to_mesh(merge.Merge(sources, upcycle, key, routers or {}), target, shardings)
  assert jax.tree.all(jax.tree.map(lambda x, where: x.sharding == where, mixed, shardings))
  return jax.tree.map(np.asarray, mixed)


def spelled_out(
  params: Sequence[dict], dense: config.Model, upcycle: config.Upcycle, key: jax.Array = KEY
) -> dict[str, np.ndarray]:
  """What `mix` makes, by path, a whole array at a time."""
  mixture = rules.mixture_model(dense, upcycle)
  sources, made = [flat(one) for one in params], {}
  if upcycle.norms == 'fold':  # of a parallel block
    for one in sources:
      scale = one['blocks/norm/scale']
      for path in one:
        if path.startswith('blocks/') and path.endswith(('query', 'key', 'value', 'gate', 'up')):
          one[path] = one[path] * scale.reshape(*scale.shape, *[1] * (one[path].ndim - 2))
      one['blocks/norm/scale'] = np.ones_like(scale)
  for rule in rules.rules(mixture):
    shape = flat(abstract(mixture))[rule.target].shape
    if rule.how == 'mean':
      made[rule.target] = merge.average([one[rule.source] for one in sources], upcycle)
    elif rule.how == 'stack':
      made[rule.target] = np.empty(shape, np.float32)
      for layer, expert in np.ndindex(shape[:2]):
        array = sources[expert if expert < len(sources) else 0][rule.source][layer]
        made[rule.target][layer, expert] = array
    else:
      made[rule.target] = merge.drawn(merge.Merge((), upcycle, key), rule, shape)
  return made


META = dict(
  format=checkpoint.FORMAT, sequence_length=16, step=7, method=None, sources=(),
  tokenizer_hash=hashlib.sha256(TOKENIZER).hexdigest(), tokenizer_path='/nowhere',
  versions=manifest.versions(), bos_token='<|bos|>', eos_token='<|eos|>',
)  # fmt: skip


def save(folder: Path, params: dict, model: config.Model, **changes) -> None:
  """A run's folder with one checkpoint, its tokenizer and a bit of an optimizer's state."""
  meta = checkpoint.Meta(**(META | {'model': model, 'run': folder.name} | changes))
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=2)
  checkpoints.save(meta.step, params, {'count': np.zeros(())}, {}, meta)
  checkpoints.close()
  (folder / 'tokenizer.json').write_bytes(TOKENIZER)


def values(folder: Path) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint's folder."""
  reader = arrays.Reader(folder / 'params')
  return {path: reader.read(path) for path in reader.specs}
