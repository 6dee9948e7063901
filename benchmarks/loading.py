"""The flags of benchmarks that look into trained models, and what these flags name."""

import jax
from absl import flags

from bam_jax import checkpoint, config
from bam_jax.data import store
from bam_jax.errors import UserError
from bam_jax.model import transformer

_CHECKPOINT = flags.DEFINE_multi_string('checkpoint', [], 'A model; may be repeated.')
_DATA = flags.DEFINE_string('data', None, 'The prepared dataset.')


def given() -> tuple[list[str], store.Dataset]:
  """The checkpoints' paths and the dataset; UserError without them."""
  if not _CHECKPOINT.value or not _DATA.value:
    raise UserError('--checkpoint and --data are required.')
  return _CHECKPOINT.value, store.open_dataset(_DATA.value)


def load(path: str) -> tuple[checkpoint.Meta, transformer.Network, transformer.Params]:
  """What a checkpoint is, its model, and its parameters on one device."""
  meta = checkpoint.read_meta(path)
  network = transformer.Network(meta.model, config.Compute())
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return meta, network, checkpoint.restore_params(path, jax.tree.map(here, network.abstract()))
