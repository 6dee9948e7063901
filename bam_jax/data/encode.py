"""Texts to files of tokens, in this process or in several: the parallel part of `prepare`."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

import numpy as np

from bam_jax.data.shards import Encoded, token_dtype
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders


@contextlib.contextmanager
def encoder(tokenizer: Tokenizer, workers: int) -> Iterator[Callable[[Path, list[str]], None]]:
  """A function that encodes some texts into a file; leaving the context waits for all of them.

  Args:
    tokenizer: encodes the texts; begin and end are added to each.
    workers: processes; 1 encodes in this one, at the call.

  Raises:
    UserError: a worker process died.
  """
  if workers == 1:
    yield functools.partial(_encode_chunk, tokenizer)
    return
  # Spawned, not forked: JAX and the tokenizers library hold threads that a fork would break.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,))
  pending = set()

  def settle(done: set[concurrent.futures.Future]) -> None:
    for future in done:
      future.result()

  def submit(path: Path, texts: list[str]) -> None:
    nonlocal pending
    pending.add(pool.submit(_encode_in_worker, path, texts))
    if len(pending) > 2 * workers:  # bounds the texts in memory
      done, pending = concurrent.futures.wait(pending, return_when='FIRST_COMPLETED')
      settle(done)

  try:
    yield submit
    settle(pending)
  except BrokenProcessPool as error:
    raise UserError(
      f'A worker process died, for want of memory perhaps: lower --workers={workers}.'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Tokenizer) -> None:
  global _worker_tokenizer
  _worker_tokenizer = tokenizer
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  # A worker holds both ends of its queue, so a killed parent would leave it waiting for ever.
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _encode_in_worker(path: Path, texts: list[str]) -> None:
  _encode_chunk(_worker_tokenizer, path, texts)


def _encode_chunk(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
  ids = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
  encoded = Encoded(
    np.concatenate([np.asarray(i, token_dtype(tokenizer.vocab_size)) for i in ids]),
    np.array([len(i) for i in ids], np.int64),
    np.array([len(text.encode()) for text in texts], np.int64),
  )
  unfinished = path.with_suffix(f'.{os.getpid()}')
  with open(unfinished, 'wb') as file:
    np.savez(file, **encoded._asdict())
    file.flush()
    folders.fsync(file.fileno())  # a chunk that exists is whole, even after a power cut
  unfinished.replace(path)


def read_chunk(path: Path) -> Encoded:
  """Reads what `encoder` wrote."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return Encoded(**arrays)
  except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
    raise UserError(
      f'{path} is damaged ({error}): delete it, and the same command writes it again.'
    ) from error
