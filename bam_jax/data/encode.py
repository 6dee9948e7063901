"""Texts to files of tokens, in this process or in several: the parallel part of `prepare`."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

import numpy as np

from bam_jax.data.shards import Encoded, token_dtype
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders


def encode_all(tokenizer: Tokenizer, tasks: Iterable[tuple[Path, list[str]]], workers: int) -> None:
  """Encodes texts into files, BOS and EOS around each text.

  Args:
    tokenizer: encodes the texts.
    tasks: each a file to write and its texts.
    workers: processes; 1 encodes in this one.

  Raises:
    UserError: a worker process died.
  """
  if workers == 1:
    for path, texts in tasks:
      _encode_chunk(tokenizer, path, texts)
    return
  # Spawned, not forked: JAX and the tokenizers library hold threads that a fork would break.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,))
  pending = collections.deque()
  try:
    for path, texts in tasks:
      pending.append(pool.submit(_encode_in_worker, path, texts))
      if len(pending) > 2 * workers:  # bounds the texts in memory
        pending.popleft().result()
    for future in pending:
      future.result()
  except BrokenProcessPool as error:
    raise UserError(
      f'A worker process died, perhaps for lack of memory: lower --workers={workers}.'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Tokenizer) -> None:
  global _worker_tokenizer
  _worker_tokenizer = tokenizer
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  # A worker holds both ends of its queue, so a killed parent would leave it waiting for ever.
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _encode_in_worker(path: Path, texts: list[str]) -> None:
  _encode_chunk(_worker_tokenizer, path, texts)


def _encode_chunk(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
  documents = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
  dtype = token_dtype(tokenizer.vocab_size)
  encoded = Encoded(
    np.concatenate([np.asarray(ids, dtype) for ids in documents]),
    np.array([len(ids) for ids in documents], np.int64),
    np.array([len(text.encode()) for text in texts], np.int64),
  )
  unfinished = path.with_suffix(f'.{os.getpid()}')
  with open(unfinished, 'wb') as file:
    np.savez(file, **encoded._asdict())
    file.flush()
    folders.fsync(file.fileno())  # a chunk that exists is whole, even after a power cut
  unfinished.replace(path)


def read_chunk(path: Path) -> Encoded:
  """Reads what `encode_all` wrote."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return Encoded(**arrays)
  except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
    raise UserError(
      f'{path} is damaged ({error}): delete it, and the same command writes it again.'
    ) from error
