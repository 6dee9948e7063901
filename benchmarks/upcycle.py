"""Upcycles checkpoints of a few GB, streaming and in memory: peak memory, time, bytes.

    python -m benchmarks.upcycle --workdir=/tmp/upcycle
    python -m benchmarks.upcycle --workdir=/tmp/upcycle --layers=16 --sources=4 --json=-

Makes dense checkpoints as training writes them (kept in --workdir for the next time), and has two
processes mix them with cold caches: `convert upcycle`, and one that restores every source whole,
merges, and saves with Orbax. In between, the disk is measured by a plain copy of the same number of
bytes: the sources' files are read, as many bytes as the mixture has are written, and an fsync
follows, as with dd conv=fsync.

`--json` writes `dense_bytes`, `mixture_bytes`, `largest_array_bytes`, `sources`, `copy_seconds` (of
each measurement) and `runs`: for each `how`, `seconds`, `cpu_seconds`, `peak_bytes` (VmHWM),
`bytes_read` and `bytes_written` (of storage), `of_largest_array` (peak over it) and `of_disk`: the
median of `copy_seconds` over `seconds`.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from flax import traverse_util

from bam_jax import checkpoint, cli, config
from bam_jax.checkpoint import manifest
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.prepare import training
from bam_jax.upcycle import merge, outputs, rules

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the checkpoints.')
_LAYERS = flags.DEFINE_integer(
  'layers', 8, 'Layers of the dense models; 190 MB each.', lower_bound=1
)
_SOURCES = flags.DEFINE_integer('sources', 3, 'Number of dense models.', lower_bound=2)
_METHOD = flags.DEFINE_enum('method', 'bam_kv_experts', ('bam_kv_experts', 'btx'), 'Of upcycling.')
_HOWS = flags.DEFINE_list('hows', ['streaming', 'in_memory'], 'What to run, in alternation.')
_ROUNDS = flags.DEFINE_integer('rounds', 2, 'Runs of each.', lower_bound=1)
_IN_MEMORY = flags.DEFINE_string('in_memory', None, 'Only mix in memory, to this folder.')


def main() -> dict[str, Any] | None:
  """Makes what is missing, measures, and prints a table."""
  if not _WORKDIR.value:
    raise UserError('--workdir is required: a folder on the disk to measure.')
  workdir = Path(_WORKDIR.value).absolute()
  model = config.Model(
    vocab_size=32_000, d_model=2048, num_layers=_LAYERS.value, num_heads=16, num_kv_heads=8,
    head_dim=128, ffn_dim=5632,
  )  # fmt: skip
  names = [f'dense_{_LAYERS.value}_{number}' for number in range(_SOURCES.value)]
  upcycle = config.Upcycle(tuple(str(workdir / name) for name in names), _METHOD.value)
  if _IN_MEMORY.value:
    return _mix_in_memory(model, upcycle, Path(_IN_MEMORY.value))
  for number, name in enumerate(names):
    if checkpoint.finished_step(workdir / name / 'checkpoints') is None:
      _make(model, workdir / name, number)
  mixture = outputs.specs(_abstract(rules.mixture_model(model, upcycle)))
  dense = outputs.specs(_abstract(model))
  facts: dict[str, Any] = {
    'dense_bytes': sum(spec.nbytes for spec in dense.values()),
    'mixture_bytes': sum(spec.nbytes for spec in mixture.values()),
    'largest_array_bytes': max(spec.nbytes for spec in mixture.values()),
    'sources': len(names),
    'runs': [],
  }
  copies = [_copy(workdir, names, facts['mixture_bytes'])]
  for _ in range(_ROUNDS.value):
    for how in _HOWS.value:
      facts['runs'].append({'how': how, **_run(how, upcycle, workdir)})
      copies.append(_copy(workdir, names, facts['mixture_bytes']))
  for run in facts['runs']:
    run['of_largest_array'] = run['peak_bytes'] / facts['largest_array_bytes']
    run['of_disk'] = statistics.median(copies) / run['seconds']
  facts['copy_seconds'] = copies
  _print(facts)
  return facts


def _make(model: config.Model, folder: Path, seed: int) -> None:
  """A dense checkpoint of noise, as the training loop saves it."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = training.train(['a'], 258)
  tokenizer.save(folder)
  rng = np.random.default_rng(seed)
  specs = outputs.specs(_abstract(model))
  arrays = {path: rng.standard_normal(spec.shape, np.float32) for path, spec in specs.items()}
  params = traverse_util.unflatten_dict(arrays, sep='/')
  meta = checkpoint.Meta(
    format=checkpoint.FORMAT,
    model=model,
    sequence_length=2048,
    tokenizer_hash=tokenizer.hash,
    tokenizer_path=str(folder),
    run=folder.name,
    step=1,
    method=None,
    sources=(),
    versions=manifest.versions(),
    bos_token=tokenizer.bos_token,
    eos_token=tokenizer.eos_token,
  )
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  checkpoints.save(1, params, {'count': np.zeros(())}, {}, meta)
  checkpoints.close()


def _mix_in_memory(model: config.Model, upcycle: config.Upcycle, output: Path) -> None:
  """`convert upcycle` without streaming."""
  readers = [checkpoint.open_params(path, model) for path in upcycle.sources]
  flat = [{path: reader.read(path) for path in reader.specs} for reader in readers]
  mixture = rules.mixture_model(model, upcycle)
  wanted, params = outputs.specs(_abstract(mixture)), {}
  for rule in rules.rules(mixture):
    if rule.how == 'mean':
      params[rule.target] = merge.average([one[rule.source] for one in flat], upcycle)
    elif rule.how == 'stack':
      params[rule.target] = np.stack([one[rule.source] for one in flat], axis=1)
    else:
      params[rule.target] = np.zeros(wanted[rule.target].shape, np.float32)
  params = traverse_util.unflatten_dict(params, sep='/')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(output, ocp.args.PyTreeSave(params))


def _abstract(model: config.Model) -> Any:
  return transformer.Network(model, config.Compute()).abstract()


def _run(how: str, upcycle: config.Upcycle, workdir: Path) -> dict[str, Any]:
  """Mixes in one process; returns its peak memory, and the bytes it moved."""
  output = workdir / f'mixture_{how}'
  shutil.rmtree(output, ignore_errors=True)
  for path in upcycle.sources:
    _evict(Path(path))
  if how == 'streaming':
    command = ['bam_jax.convert', 'upcycle', f'--method={upcycle.method}', f'--output={output}']
    command += [f'--from={path}' for path in upcycle.sources]
  else:
    kept = [_WORKDIR, _LAYERS, _SOURCES, _METHOD]
    command = ['benchmarks.upcycle', f'--in_memory={output}']
    command += [f'--{flag.name}={flag.value}' for flag in kept]
  start = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, '-m', *command],
    stderr=subprocess.PIPE,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  status, io, ended = {}, {}, 0
  while not ended:
    # Peaks only grow: the last look before the end has them.
    status, io = _proc(process.pid, 'status') or status, _proc(process.pid, 'io') or io
    time.sleep(0.01)
    ended, code, usage = os.wait4(process.pid, os.WNOHANG)
  process.returncode = os.waitstatus_to_exitcode(code)
  if process.returncode:
    raise UserError(f'{how} failed: {process.stderr.read().decode().strip()}')
  os.sync()
  seconds = time.monotonic() - start
  shutil.rmtree(output)
  return {
    'seconds': seconds,
    'cpu_seconds': usage.ru_utime + usage.ru_stime,
    'peak_bytes': 1024 * int(status['VmHWM'].split()[0]),
    'bytes_read': int(io['read_bytes']),
    'bytes_written': int(io['write_bytes']),
  }


def _proc(pid: int, name: str) -> dict[str, str]:
  try:
    text = Path(f'/proc/{pid}/{name}').read_text()
  except OSError:
    return {}
  facts = dict(line.split(':', 1) for line in text.splitlines())
  return facts if name == 'io' or 'VmHWM' in facts else {}


def _copy(workdir: Path, names: Sequence[str], nbytes: int) -> float:
  """Seconds for reading the sources' files and writing `nbytes`, with nothing in between."""
  for name in names:
    _evict(workdir / name)
  start, left = time.monotonic(), nbytes
  with open(workdir / 'copy', 'wb', buffering=0) as output:
    for name in names:
      for path in (workdir / name).rglob('params/**/*'):
        if path.is_file():
          with open(path, 'rb', buffering=0) as file:
            while block := file.read(2**24):
              left -= output.write(block[:left]) if left else 0
    os.fsync(output.fileno())
  seconds = time.monotonic() - start
  (workdir / 'copy').unlink()
  return seconds


def _evict(path: Path) -> None:
  """Evicts files from the page cache."""
  os.sync()
  for file in [path] if path.is_file() else path.rglob('*'):
    if file.is_file():
      with open(file, 'rb') as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _print(facts: dict[str, Any]) -> None:
  gigabytes = lambda nbytes: f'{nbytes / 1e9:.2f}'
  title = (
    f'{facts["sources"]} of {gigabytes(facts["dense_bytes"])} GB to '
    f'{gigabytes(facts["mixture_bytes"])} GB, largest array '
    f'{gigabytes(facts["largest_array_bytes"])} GB; a plain copy: '
    f'{", ".join(f"{seconds:.1f}" for seconds in facts["copy_seconds"])} s'
  )
  rows = [
    (run['how'], gigabytes(run['peak_bytes']), f'{run["of_largest_array"]:.2f}',
     f'{run["seconds"]:.1f}', f'{run["cpu_seconds"]:.1f}', gigabytes(run['bytes_read']),
     gigabytes(run['bytes_written']), f'{run["of_disk"]:.2f}')
    for run in facts['runs']
  ]  # fmt: skip
  columns = 'peak GB,of largest array,seconds,CPU,read GB,written GB,of disk'.split(',')
  cli.console().print(cli.table(title, ['how'], columns, rows))


if __name__ == '__main__':
  cli.run(main)
