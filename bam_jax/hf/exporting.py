"""Converts our checkpoints to folders for transformers, one tensor at a time, without torch."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from bam_jax import checkpoint
from bam_jax.checkpoint import arrays
from bam_jax.config.strict import require
from bam_jax.files import folders
from bam_jax.hf import card, config_json, files, names, tokenizer_files
from bam_jax.hf.files import Progress

DTYPES = ('float32', 'bfloat16')
# The code that transformers runs for a mixture; it does not import bam_jax.
CODE = ('configuration_bam.py', 'modeling_bam.py')


def convert(
  source: epath.PathLike,
  output: str,
  *,
  dtype: str | None,
  max_shard_size: str,
  progress: Progress,
  architecture: str | None = None,
) -> dict[str, Any]:
  """Writes a folder that AutoModelForCausalLM and AutoTokenizer load; returns facts about it.

  `dtype` is that of tensors except routers, which keep theirs; None: the checkpoint's. Files have
  values of at most `max_shard_size`, such as '5GB'. `architecture` is the class of transformers;
  None: the first that computes the model. UserError if the checkpoint is damaged or not finite, or
  the output exists or cannot be written.
  """
  wrong = f'--output={output}: export to a local folder, and copy that to the bucket.'
  require(not folders.in_bucket(output), wrong)
  source = checkpoint.find(source)  # once: a run's newest may change
  meta = checkpoint.read_meta(source)
  tokenizer = checkpoint.open_tokenizer(source, meta)
  reader = checkpoint.open_params(source, meta.model)
  biased = any(np.any(reader.read(path)) for path in reader.specs if path.endswith('expert_bias'))
  origin = meta.sequence_length, meta.method, meta.sources
  facts = config_json.from_model(meta.model, *origin, architecture, biased)
  table, zeros = config_json.tensors(meta.model, facts)
  specs = _specs(reader, table, dtype)
  stored = specs[table['embed/table'].name].dtype
  specs |= {name: arrays.Spec(shape, stored) for name, shape in zeros.items()}
  total = sum(spec.nbytes for spec in specs.values())
  shards = files.plan(specs, max_shard_size)
  with folders.new_folder(output, total) as beside:
    folder = Path(beside)
    order = [name for shard in shards.values() for name in shard]
    files.write(folder, shards, specs, _tensors(reader, table, order, specs, progress))
    ids = tokenizer_files.write(folder, tokenizer, meta.sequence_length)
    facts |= ids | {'dtype': stored.name}
    architecture = facts['architectures'][0]
    files.write_json(folder / files.CONFIG, facts)
    padded = {'pad_token_id': tokenizer.eos_id} | {k: v for k, v in ids.items() if v is not None}
    files.write_json(folder / 'generation_config.json', padded)
    if 'auto_map' in facts:
      for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / 'README.md').write_text(card.text(meta, architecture, tokenizer), encoding='utf-8')
  about = dict(architecture=architecture, dtype=facts['dtype'], files=list(shards))
  return about | dict(tensors=len(specs), bytes=total)


def _specs(reader: arrays.Reader, table: names.Table, dtype: str | None) -> dict[str, arrays.Spec]:
  """The tensors by name: those outside of layers, then layer by layer."""
  found, pieces = {}, names.pieces(table)
  for name in sorted(pieces, key=lambda name: pieces[name][0].index[:1]):
    path = pieces[name][0].path
    # transformers keeps routers in float32, as training does.
    keep = dtype is None or 'router' in name
    rows, *rest = names.shape(table, pieces[name])
    # Experts that are in one tensor are its first axis.
    experts = () if '.experts.' in name else table[path].stacked[1:]
    shape = *experts, rows // math.prod(experts), *rest
    found[name] = arrays.Spec(shape, reader.specs[path].dtype if keep else jnp.dtype(dtype))
  return found


def _tensors(
  reader: arrays.Reader, table: names.Table, order: list[str], specs: dict, progress: Progress
) -> Iterator[np.ndarray]:
  """The values of tensors in their order in the files."""
  pieces = dict.fromkeys(order, ()) | names.pieces(table)
  regions = arrays.read_ahead((reader, *piece[:2]) for name in order for piece in pieces[name])
  total, done = sum(spec.nbytes for spec in specs.values()), 0
  for name in order:
    theirs, dtype = np.zeros(*specs[name]), specs[name].dtype
    for path, index, rows in pieces[name]:
      ours = next(regions).astype(dtype, copy=False)
      arrays.check_finite(ours, reader.folder, path, reader.specs[path], index)
      places = theirs.reshape(-1, *table[path].theirs[1:])
      places[rows] = names.to_theirs(table[path], ours, dtype)
    done += theirs.nbytes
    progress(done, total)
    yield theirs
