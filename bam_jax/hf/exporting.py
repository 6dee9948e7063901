"""A checkpoint of ours into a folder for transformers, one tensor at a time, and without torch."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from bam_jax import checkpoint
from bam_jax.checkpoint import arrays
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.hf import card, config_json, files, names, tokenizer_files

# What a mixture's folder holds for transformers to run: it imports nothing of ours.
CODE = ('configuration_bam.py', 'modeling_bam.py')


def convert(
  source: epath.PathLike,
  output: str,
  *,
  dtype: str | None,
  max_shard_bytes: int,
  progress: Callable[[int, int], None],
) -> dict[str, Any]:
  """Makes a folder that AutoModelForCausalLM and AutoTokenizer load.

  Args:
    source: the checkpoint: a step's folder, or a run's.
    output: the folder; does not exist.
    dtype: of the tensors but for routers, which keep theirs; None: as the checkpoint has them.
    max_shard_bytes: of the values in a file.
    progress: is told bytes written, and of how many.

  Returns:
    Facts about the folder.

  Raises:
    UserError: the checkpoint is damaged or lacks its tokenizer, a value is NaN or infinite, or the
      output exists or cannot be written.
  """
  if folders.in_bucket(output):
    raise UserError(f'--output={output}: export to a local folder, and copy that.')
  checkpoint_folder = checkpoint.find(source)
  meta = checkpoint.read_meta(checkpoint_folder)
  file = checkpoint.find_tokenizer(checkpoint_folder)
  tokenizer = Tokenizer.load(file, meta.bos_token, meta.eos_token)
  reader, table = arrays.Reader(checkpoint_folder / 'params'), names.tensors(meta.model)
  _check(reader, table)
  specs = _specs(reader, table, dtype)
  total = sum(spec.nbytes for spec in specs.values())
  with folders.new_folder(output, total) as beside:
    folder = Path(beside)
    writer = files.Writer(folder, specs, max_shard_bytes)
    _copy(reader, table, writer, specs, progress)
    writer.finish()
    ids = tokenizer_files.write(folder, file, tokenizer, meta.sequence_length)
    facts = {
      **config_json.from_model(meta.model, meta.sequence_length, meta.method, meta.sources),
      **ids,
      'dtype': specs[names.TABLE].dtype.name,
    }
    _write_json(folder / files.CONFIG, facts)
    pad = tokenizer.eos_id if ids['pad_token_id'] is None else ids['pad_token_id']
    _write_json(folder / 'generation_config.json', ids | {'pad_token_id': pad})
    if 'auto_map' in facts:
      for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / 'README.md').write_text(card.text(meta, facts, tokenizer), encoding='utf-8')
  return {
    'architecture': facts['architectures'][0],
    'dtype': facts['dtype'],
    'tensors': len(specs),
    'bytes': total,
    'files': list(writer.files),
  }


def _check(reader: arrays.Reader, table: Mapping[str, names.Tensor]) -> None:
  """UserError unless the checkpoint has the arrays of its model, and no others."""
  for path in sorted(reader.specs.keys() | table.keys()):
    tensor, spec = table.get(path), reader.specs.get(path)
    wanted = tensor and (*tensor.stacked, *tensor.ours)
    got = spec and spec.shape
    if got != wanted:
      raise UserError(
        f'{reader.folder} has {path} of shape {got} where its meta wants {wanted}: it is damaged.'
      )


def _specs(
  reader: arrays.Reader, table: Mapping[str, names.Tensor], dtype: str | None
) -> dict[str, arrays.Spec]:
  """The tensors by name, layer by layer, as they lie in the files."""
  placed = []
  for path, tensor in table.items():
    stored = reader.specs[path].dtype
    # transformers keeps routers in float32, as training does.
    kept = dtype is None or 'router' in path
    spec = arrays.Spec(tensor.theirs, stored if kept else jnp.dtype(dtype))
    outside = -1 if path.startswith('embed/') else float('inf')  # before or after the layers
    for index, name in tensor.parts():
      placed.append((index[0] if index else outside, name, spec))
  return {name: spec for _, name, spec in sorted(placed, key=lambda item: item[0])}


def _copy(
  reader: arrays.Reader,
  table: Mapping[str, names.Tensor],
  writer: files.Writer,
  specs: Mapping[str, arrays.Spec],
  progress: Callable[[int, int], None],
) -> None:
  parts = [(path, index, name) for path in table for index, name in table[path].parts()]
  regions = arrays.read_ahead((reader, path, index) for path, index, _ in parts)
  total, done = sum(spec.nbytes for spec in specs.values()), 0
  for (path, _, name), ours in zip(parts, regions):
    theirs = names.to_theirs(table[path], ours, specs[name].dtype)
    if not np.isfinite(theirs).all():
      raise UserError(f'{reader.folder} has {path} with values that are NaN or infinite.')
    writer.write(name, theirs)
    done += theirs.nbytes
    progress(done, total)


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(facts, indent=1, sort_keys=True) + '\n', encoding='utf-8')
