"""Folders of transformers and GGUF files, read where they are or converted; without torch."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.config.strict import require
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.hf import config_json, files, gguf, names
from bam_jax.hf.files import Progress
from bam_jax.model import rope
from bam_jax.upcycle import sources

# Tensors of older files that follow from config.json.
_FREQUENCIES = 'rotary_emb.inv_freq'
_BUFFERS = _FREQUENCIES, '.attention.bias', '.attention.masked_bias'
_IMAGES = 'vision_tower.', 'multi_modal_projector.'  # beside a text model


def convert(
  source: str,
  output: epath.PathLike,
  *,
  dtype: str,
  command: str,
  progress: Progress,
  **words: str | None,
) -> checkpoint.Meta:
  """Writes a checkpoint of the model in a folder or GGUF file, and its tokenizer; returns `meta`.

  `words` are the tokenizer and its tokens, as in `open_folder`. Values are rounded to nearest if
  `dtype`, 'float32' or 'bfloat16', is the narrower. `command` is recorded. UserError if the model
  is not supported, its files are damaged or do not fit its config.json, or the output exists or
  cannot be written.
  """
  opened = open_folder(source, **words)
  meta, reader = opened.meta, opened.reader
  specs = {path: spec._replace(dtype=jnp.dtype(dtype)) for path, spec in reader.specs.items()}
  with folders.new_folder(output, sum(spec.nbytes for spec in specs.values())) as beside:
    with arrays.Writer(beside / 'params', specs) as writer:
      hashes = _copy(reader, writer, progress)
    opened.tokenizer().save(beside)
    content = manifest.content_hash(hashes)
    origin = manifest.Source(meta.tokenizer_path, hash=content, array_hashes=hashes)
    made = (
      manifest.Made(path, 'transpose' if tensor.is_matrix else 'copy', tensor.name.format('*', '*'))
      for path, tensor in reader.table.items()
    )
    history = manifest.Manifest(command, manifest.now(), (origin,), tuple(made))
    meta = dataclasses.replace(meta, manifest=history)
    checkpoint.write_meta(beside, meta)
  return meta


def open_folder(
  source: str,
  tokenizer: str | None = None,
  bos_token: str | None = None,
  eos_token: str | None = None,
) -> sources.Source:
  """Opens a folder or GGUF file, of which only the tensors' values are left to read.

  The tokenizer is a file, or a folder that holds it; by default the source. Its tokens around
  documents are by default well-known ones, as in bam_jax.prepare.
  """
  folder = Path(source)
  adapter = folder / 'adapter_config.json'
  require(not adapter.exists(), f'{adapter}: a LoRA adapter; merge it into its base model first.')
  packed = gguf.Reader(folder) if folder.suffix == gguf.SUFFIX else None
  where = folder if packed else folder / files.CONFIG
  facts = None if packed else files.read_json(where)
  try:
    facts = gguf.config_json(packed) if packed else config_json.of_text(facts)
    model = config_json.to_model(facts)
    length, method, experts = config_json.to_origin(facts)
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  reader, table = packed or files.Reader(folder), config_json.tensors(model, facts)[0]
  _check(reader, table, model)
  if packed and not tokenizer:
    words = gguf.tokenizer(packed, bos_token, eos_token)
  else:
    words = Tokenizer.load(tokenizer or source, bos_token, eos_token)
  wrong = f'{tokenizer or source} has {words.vocab_size} tokens, but the model in {source} has'
  fits = words.vocab_size <= model.vocab_size
  require(fits, f'{wrong} {model.vocab_size}: it is the tokenizer of another model.')
  place = os.path.abspath(source)
  meta = checkpoint.Meta(
    format=checkpoint.FORMAT,
    model=model,
    sequence_length=length,
    tokenizer_hash=words.hash,
    tokenizer_path=place,
    run=folder.stem if packed else os.path.basename(place),
    step=0,
    method=method,
    sources=experts,
    versions=manifest.versions(),
    bos_token=words.bos_token,
    eos_token=words.eos_token,
  )
  return sources.Source(source, epath.Path(source), meta, Reader(reader, table), lambda: words)


def _check(reader, table: names.Table, model: config.Model) -> None:
  """UserError unless the folder has the tensors of the model, with their shapes, and no others."""
  expected = {name: names.shape(table, parts) for name, parts in names.pieces(table).items()}
  found = {n for n in reader.specs if not n.endswith(_BUFFERS) and not n.startswith(_IMAGES)}
  # PyTorch lists a tied head although it is the table; files may therefore contain both.
  if tied_twice := model.tied_embeddings and names.HEAD in reader.specs:
    expected[names.HEAD] = expected[names.TABLE]
  for name in sorted(found | expected.keys()):
    require(name in reader.specs, f'{reader.folder} lacks {name}, which its config describes.')
    shape, described = reader.specs[name].shape, expected.get(name, 'no such tensor')
    wrong = f'{reader.folder} has {name} of shape {shape}; its config says {described}.'
    require(shape == described, wrong)
  first = model.layer_kinds()[0]
  for name in (name for name in reader.specs if name.endswith(_FREQUENCIES)):
    wrong = f'{reader.folder} has {name} that differs from the frequencies of its config.json.'
    want_R, _ = rope.frequencies(model, first.theta, first.scaling, jnp.float32)
    fits = reader.specs[name].shape == want_R.shape
    require(fits and np.allclose(reader.read(name), want_R, rtol=0.01, atol=1e-6), wrong)
  if tied_twice:
    wrong = 'is not the table, although tie_word_embeddings is true, and transformers 5 would serve'
    fix = 'set that to false, or delete the tensor'
    same = np.array_equal(reader.read(names.HEAD), reader.read(names.TABLE), equal_nan=True)
    require(same, f'{reader.folder}: {names.HEAD} {wrong} it: {fix}.')


def _copy(reader: 'Reader', writer: arrays.Writer, progress: Progress) -> dict[str, str]:
  """Writes every tensor to its place; returns the `manifest.Hash` of each."""
  tensors, hashes, done = reader.tensors, {}, 0
  total = sum(tensors.specs[name].nbytes for name in reader.pieces)
  for name, parts in reader.pieces.items():
    theirs, digest = tensors.read(name), manifest.Hash()
    digest.update(theirs)
    hashes[name] = digest.hexdigest()
    done += theirs.nbytes
    dtype = writer.specs[parts[0].path].dtype
    theirs = theirs.astype(dtype, copy=False)
    arrays.check_finite(theirs, tensors.folder, name, tensors.specs[name])
    for path, index, rows in parts:
      writer.write(path, index, names.to_ours(reader.table[path], theirs[rows], dtype))
    progress(done, total)
  return hashes


def open_any(path: str) -> sources.Source:
  """Opens a folder of transformers, a GGUF file or a checkpoint of ours; else UserError."""
  folder = Path(path)
  known = (folder / files.CONFIG).is_file() and any(folder.glob('*.safetensors'))
  is_theirs = known or folder.suffix == gguf.SUFFIX
  return open_folder(path) if is_theirs else sources.open_checkpoint(path)


def adapt(
  opened: Sequence[sources.Source], first_rope: bool, untie: bool, length: int
) -> list[sources.Source]:
  """The sources, less unlike each other: what a mixture of them computes must be trained on.

  `first_rope`: all have the first one's rotary positions. `untie`: those whose head is the table
  have a copy of it as a head. `length` is that of all, if it is not 0.
  """
  adapted, first = [], opened[0].meta.model
  for source in opened:
    model, reader = source.meta.model, source.reader
    if first_rope:
      rope = dict(rope_theta=first.rope_theta, rope_scaling=first.rope_scaling)
      model = dataclasses.replace(model, **rope)
    if untie and model.tied_embeddings:
      model, reader = dataclasses.replace(model, tied_embeddings=False), Untied(reader)
    length_of_it = length or source.meta.sequence_length
    meta = dataclasses.replace(source.meta, model=model, sequence_length=length_of_it)
    adapted.append(source._replace(meta=meta, reader=reader))
  return adapted


class Untied:
  """Reads a tied model as if a copy of its table were its head."""

  def __init__(self, reader: sources.Reader):
    shape, dtype = reader.specs['embed/table']
    self._reader = reader
    self.specs = {**reader.specs, 'unembed/kernel': arrays.Spec(shape[::-1], dtype)}

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array."""
    if path != 'unembed/kernel':
      return self._reader.read(path, index)
    rows, words = (*index, slice(None), slice(None))[:2]
    return np.ascontiguousarray(self._reader.read('embed/table', (words, rows)).T)


class Reader:
  """Reads our arrays, by path, out of a folder's tensors."""

  def __init__(self, tensors: files.Reader | gguf.Reader, table: names.Table):
    self.tensors, self.table, self.pieces = tensors, table, names.pieces(table)
    self._places, self.specs = {}, {}
    for name, parts in self.pieces.items():
      for path, index, rows in parts:
        self._places[path, index] = name, rows
        self.specs[path] = arrays.Spec(table[path].shape, tensors.specs[name].dtype)

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array: of one layer, or some rows and columns of one without layers."""
    tensor = self.table[path]
    count = len(tensor.stacked)
    name, rows = self._places[path, tuple(index[:count])]
    inside = tuple(index[count:])
    if not count and len(tensor.ours) == 2:  # of embeddings, only the words that are asked for
      inside = (*inside, slice(None), slice(None))[:2]
      words, channels = inside[::-1] if tensor.is_matrix else inside
      part = self.tensors.read(name, words)[:, channels]
      return np.ascontiguousarray(part.T if tensor.is_matrix else part)
    is_slice = isinstance(rows, slice)
    array = self.tensors.read(name, rows) if is_slice else self.tensors.read(name)[rows]
    return names.to_ours(tensor, array, self.specs[path].dtype)[inside]
