"""Reads prepared datasets of up to 1e12 tokens: memory, start, resume, tokens a second, hosts.

    python -m benchmarks.data --workdir=/tmp/data
    python -m benchmarks.data --workdir=/tmp/data --parts=size,hosts --json=-

`size`: datasets of 1e6, 1e9 and 1e12 tokens, made up below zarr: their arrays' descriptions are
real, and each of their files is a link to one of a few real ones, so that a reader opens as many,
and keeps as many indexes, as it would. A process for each opens the dataset, makes the first batch,
resumes at step 1,000,000, and makes 200 more. `hosts`: 64 hosts open the largest in turn; together
they must read every row of a batch once. `disk`: tokens a second of one host from a real dataset,
its files out of the page cache at first, then in it. `bucket`: the same from a server on this
machine that answers every request after 50 ms. `prepare`: the peak memory of the command at 0.3
and 3 GB of text.

Sequences have 2,048 tokens, and a host reads 32 of each batch. `--json` writes an object for each
part, by case: of readers `first_batch_seconds` (imports excluded), `resume_seconds`,
`tokens_per_second` and `peak_bytes` (VmHWM); of `hosts` `rows`, `distinct` and `seconds_a_host`; of
`prepare` `peak_bytes` and `seconds`.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from bam_jax import cli
from bam_jax.data import mixture, store
from bam_jax.errors import UserError
from bam_jax.prepare import dataset, shuffle, training

PARTS = 'size', 'hosts', 'disk', 'bucket', 'prepare'
SIZES = 10**6, 10**9, 10**12
LENGTH, ROWS = 2048, 32
HOSTS = 64
BATCHES = 200
LATENCY = 0.05
DOCUMENT = 512  # tokens of each in made-up text
LINKS = 50_000  # to one file: file systems have a limit
WORDS = 30_000
REAL = 2**27  # tokens of the dataset of `disk` and `bucket`
TEXT = 3 * 10**8, 3 * 10**9  # bytes

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the datasets: 1 GB, 7 with `prepare`.')
_PARTS = flags.DEFINE_list('parts', list(PARTS[:4]), f'Some of {", ".join(PARTS)}.')
_READ = flags.DEFINE_string('read', None, 'Only read this dataset, and print what was measured.')


def main() -> dict[str, Any] | None:
  """Makes what is missing, measures, and prints a table."""
  if _READ.value:
    print(json.dumps(_read(_READ.value)))
    return None
  if not _WORKDIR.value:
    raise UserError('--workdir is required: a folder for the datasets.')
  workdir = Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  measure = dict(size=_size, hosts=_hosts, disk=_disk, bucket=_bucket, prepare=_prepare)
  if unknown := set(_PARTS.value) - set(PARTS):
    raise UserError(f'--parts={",".join(sorted(unknown))} is not among {", ".join(PARTS)}.')
  facts = {part: measure[part](workdir) for part in _PARTS.value}
  rows = [
    (f'{part} {case}', what, f'{value:,.3g}' if isinstance(value, float) else f'{value:,}')
    for part, cases in facts.items()
    for case, found in cases.items()
    for what, value in found.items()
  ]
  cli.console().print(cli.table('Reading prepared data', ['part', 'what'], ['measured'], rows))
  return facts


def _made_up(workdir: Path, tokens: int, real: bool = False) -> Path:
  """A dataset of one domain whose files are links to a few, or all written (`real`)."""
  folder = workdir / f'{"real" if real else "made_up"}_{tokens}'
  if (folder / store.MANIFEST).exists():
    return folder
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  dtype, rng = store.token_dtype(WORDS), np.random.default_rng(0)
  documents = -(-tokens // DOCUMENT)
  for name, shape, kind in (
    ('tokens', (2, tokens), dtype),
    ('bytes', (documents,), np.dtype(np.uint32)),
  ):
    array = shuffle.create(folder / 'text' / 'train' / name, shape, kind, False)
    files = -(-shape[-1] // shuffle.SHARD)
    for number in range(files if real else 1):
      first = number * shuffle.SHARD
      size = min(shuffle.SHARD, shape[-1] - first)
      values = np.full((*shape[:-1], size), 4 * DOCUMENT, kind)
      if name == 'tokens':
        values[0] = np.minimum(rng.zipf(1.2, size), WORDS - 1)  # about as compressible as text
        values[1] = (np.arange(first, first + size) % DOCUMENT) == 0
      array[..., first : first + size].write(values).result()
    shards = folder.joinpath('text', 'train', name, 'c', *['0'] * (len(shape) - 1))
    source = shards / '0'
    for number in range(1, 1 if real else files):
      if number % LINKS == 0:
        source = Path(shutil.copy(shards / '0', shards / str(number)))
      else:
        os.link(source, shards / str(number))
  tokenizer = training.train(['a'], 258)
  tokenizer.save(folder)
  manifest = {
    'format': store.FORMAT,
    'tokenizer': dataset._tokenizer_facts(tokenizer) | {'vocab_size': WORDS},
    'domains': {'text': {'train': dict(documents=documents, tokens=tokens, bytes=4 * tokens)}},
  }
  (folder / store.MANIFEST).write_text(json.dumps(manifest))
  return folder


def _batches(path: str, share: tuple[int, int] = (0, 1), rows: int = ROWS):
  documents = {'text': store.open_dataset(path).documents('text', 'train')}
  how = dict(sequence_length=LENGTH, batch_size=rows, seed=0)
  return mixture.batches(documents, {'text': 1.0}, **how, share=share)


def _read(path: str) -> dict[str, float]:
  """In a process of its own: start, resume, and tokens a second of a stream of batches."""
  start = time.monotonic()
  iterator = mixture.iterate(_batches(path), prefetch=4)
  next(iterator)
  facts = {'first_batch_seconds': time.monotonic() - start}
  start = time.monotonic()
  iterator = mixture.iterate(_batches(path), prefetch=4)
  iterator.set_state({'next_index': 10**6})
  next(iterator)
  facts['resume_seconds'] = time.monotonic() - start
  start = time.monotonic()
  for _ in range(BATCHES):
    next(iterator)
  facts['tokens_per_second'] = BATCHES * ROWS * LENGTH / (time.monotonic() - start)
  status = Path('/proc/self/status').read_text()
  return facts | {'peak_bytes': 1024 * int(re.search(r'VmHWM:\s*(\d+)', status)[1])}


def _process(path: Path | str, environment: dict[str, str] | None = None) -> dict[str, float]:
  command = [sys.executable, '-m', 'benchmarks.data', f'--read={path}']
  env = {**os.environ, **(environment or {}), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f'{path} could not be read: {done.stderr.strip()}')
  return json.loads(done.stdout)


def _size(workdir: Path) -> dict[str, Any]:
  return {f'{tokens:.0e}': _process(_made_up(workdir, tokens)) for tokens in SIZES}


def _hosts(workdir: Path) -> dict[str, Any]:
  """Every host's rows of one batch, by where in the tokens they begin."""
  path, read, request = _made_up(workdir, SIZES[-1]), [], store.Documents.request
  store.Documents.request = lambda self, start, size: (
    read.append(start),
    request(self, start, size),
  )[1]
  start = time.monotonic()
  for host in range(HOSTS):
    _batches(str(path), (host, HOSTS), HOSTS * ROWS)[1_000]
  seconds, mine = (time.monotonic() - start) / HOSTS, list(read)
  read.clear()
  _batches(str(path), rows=HOSTS * ROWS)[1_000]
  if read != mine or len(set(read)) != HOSTS * ROWS:
    raise UserError('The hosts did not read the rows of the batch, each once.')
  store.Documents.request = request
  return {'64': {'rows': len(mine), 'distinct': len(set(mine)), 'seconds_a_host': seconds}}


def _disk(workdir: Path) -> dict[str, Any]:
  path = _made_up(workdir, REAL, real=True)
  os.sync()
  for file in path.rglob('*'):
    if file.is_file():
      with open(file, 'rb') as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  return {temperature: _process(path) for temperature in ('cold', 'warm')}


def _bucket(workdir: Path) -> dict[str, Any]:
  """Through a server in a process of its own, which takes 50 ms for every answer."""
  path = _made_up(workdir, REAL, real=True)
  code = 'import sys; from benchmarks import data; data.serve(sys.argv[1])'
  server = subprocess.Popen(
    [sys.executable, '-c', code, str(path)], stdout=subprocess.PIPE, text=True
  )
  try:
    url = server.stdout.readline().strip()
    environment = {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }
    return {'50 ms': _process('gs://bucket/data', environment)}
  finally:
    server.kill()
    server.communicate()


def serve(folder: str) -> None:
  """Objects of gs://bucket/data from a folder, by the requests of a reader; prints its address."""

  async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):  # the client left
      while True:
        head = (await reader.readuntil(b'\r\n\r\n')).decode()
        await reply(head, writer)

  async def reply(head: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(LATENCY)
    name = re.search(r'/o/([^? ]+)', head)
    path = Path(folder, urllib.parse.unquote(name[1]).removeprefix('data/')) if name else None
    if path is None or not path.is_file():
      writer.write(b'HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n')
      return
    size, status, more = path.stat().st_size, '200 OK', ''
    first, last = 0, size - 1
    facts = json.dumps({'name': name[1], 'size': str(size), 'generation': '1', 'bucket': 'bucket'})
    body = facts.encode()
    if 'alt=media' in head:
      if asked := re.search(r'range: bytes=(\d*)-(\d*)', head, re.IGNORECASE):
        begin, end = asked.groups()
        first = int(begin) if begin else size - int(end)
        last = min(int(end), size - 1) if begin and end else size - 1
        status, more = '206 Partial Content', f'content-range: bytes {first}-{last}/{size}\r\n'
      with open(path, 'rb') as file:
        file.seek(first)
        body = file.read(last - first + 1)
    sent = f'HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}x-goog-generation: 1\r\n\r\n'
    writer.write(sent.encode() + body)

  async def run() -> None:
    server = await asyncio.start_server(answer, '127.0.0.1', 0)
    print(f'http://127.0.0.1:{server.sockets[0].getsockname()[1]}', flush=True)
    await server.serve_forever()

  asyncio.run(run())


def _prepare(workdir: Path) -> dict[str, Any]:
  """The command in a process of its own, on text of a few thousand words at random."""
  facts, rng = {}, np.random.default_rng(0)
  words = [''.join(map(chr, rng.integers(97, 123, rng.integers(2, 11)))) for _ in range(5_000)]
  for size in TEXT:
    path, output = workdir / 'text' / f'{size}.jsonl', workdir / f'prepared_{size}'
    if not path.exists():
      path.parent.mkdir(exist_ok=True)
      pool = [' '.join(rng.choice(words, 400)) for _ in range(5_000)]
      with open(path, 'w') as file:
        while file.tell() < size:
          pairs = rng.integers(len(pool), size=(5_000, 2))
          file.writelines(json.dumps({'text': f'{pool[a]} {pool[b]}'}) + '\n' for a, b in pairs)
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, '-m', 'bam_jax.prepare', f'--input=text={path}']
    start = time.monotonic()
    process = subprocess.Popen(
      [*command, f'--output={output}', '--train_tokenizer=8192'], stderr=subprocess.DEVNULL
    )
    _, code, usage = os.wait4(process.pid, 0)
    if code:
      raise UserError(f'{" ".join(command)} failed.')
    facts[f'{size:.0e}'] = {
      'peak_bytes': 1024 * usage.ru_maxrss,
      'seconds': time.monotonic() - start,
    }
    shutil.rmtree(output)
  return facts


if __name__ == '__main__':
  cli.run(main)
