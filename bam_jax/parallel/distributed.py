"""Several processes as one job: how they connect, and how they exit when one is lost.

On a TPU pod no flag is needed. Elsewhere every process is started with the same command, and its
own `--process_id`:

    python -m bam_jax.main ... --coordinator=HOST:PORT --process_count=4 --process_id=0

HOST runs process 0, and PORT is free there. Under SLURM (`srun`), Open MPI (`mpirun`; from
version 5 on with mpi4py installed) or in a Kubernetes job (with the package `kubernetes`),
`--coordinator=auto` provides all three; JAX then gives each process the GPU of its local rank.

Every wait is bounded. Joining ends after `--join_timeout`. If a process is lost, the others exit:
at once if the network reports a closed connection, else after `--lost_timeout`, through JAX's
heartbeats, wherever they wait. In the latter case JAX aborts with a message of its own.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags

from bam_jax import errors
from bam_jax.config.strict import require
from bam_jax.files import folders

FAILED = 1  # exit status of an error, if Python can choose it
AGAIN = 'start all processes again with the same command, which resumes from the newest checkpoint'
AUTO = 'auto'
# Seconds that process 0 waits before it exits: its exit ends the others, in C++, and they should
# first report an error that all have found.
GRACE = 2.0


Place = tuple[str | None, int | None, int | None]  # coordinator, process count and id, or JAX's own


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Makes this process part of its job for the duration of a `with` block; no-op for a single one.

  Must come before anything asks JAX for its devices. In a job, an error exits the process at once,
  since the others could only wait for it. UserError if flags of main contradict each other or the
  job.
  """
  told = flags.FLAGS
  pod = has_tpu(Path('/dev'))
  place = place_of(told.coordinator, told.process_count, told.process_id, pod)
  if place is None or not _join(place, told.join_timeout, told.lost_timeout):
    yield
    return
  this = f'process {jax.process_index()} of {jax.process_count()}'
  try:
    yield
  except KeyboardInterrupt:
    _leave('interrupted at once, nothing saved.', 128 + signal.SIGINT)
  except Exception as error:
    if said := errors.sentence(error):
      _leave(said, errors.USER_ERROR, GRACE if jax.process_index() == 0 else 0.0)
    if said := _of_jax(error):
      why = f'({said}), most likely because another one was lost'
      sentence = f'{this} cannot continue {why}: {AGAIN}.'
    else:
      traceback.print_exc()
      # Library threads report a lost process in messages of their own.
      sentence = f'{this} has failed, and the others end with it. If one was lost before, {AGAIN}.'
    _leave(sentence, FAILED)


def _of_jax(error: BaseException | None) -> str:
  """The first line of the JAX error that an error is or was caused by; '' if there is none."""
  while error is not None and not errors.of_jax(error):
    error = error.__cause__ or error.__context__
  return folders.first_line(error) if error else ''


def place_of(
  coordinator: str | None, process_count: int | None, process_id: int | None, pod: bool
) -> Place | None:
  """The place that the flags give, on a machine that may be in a `pod`; None without a job."""
  numbers = process_count, process_id
  if coordinator in (None, AUTO):
    wrong = '--process_count and --process_id require --coordinator=HOST:PORT; omit them with'
    require(numbers == (None, None), f'{wrong} --coordinator=auto.')
    return (None, None, None) if pod or coordinator else None
  wrong = f'--coordinator={coordinator} requires --process_count, the same for all, and'
  require(None not in numbers, f'{wrong} --process_id, different for each process.')
  host, _, port = coordinator.rpartition(':')
  wrong = f'--coordinator={coordinator} is not HOST:PORT, nor "auto".'
  require(host and port.isdecimal() and 0 < int(port) < 2**16, wrong)
  wrong = f'--process_id={process_id} is not below --process_count={process_count}: count from 0.'
  require(process_id < process_count, wrong)
  return coordinator, process_count, process_id


def has_tpu(devices: Path) -> bool:
  """Whether JAX will use TPUs of this machine, found in `devices` (/dev), which may be in a pod."""
  chips = [*devices.glob('accel[0-9]*'), *devices.glob('vfio/[0-9]*')]
  wanted = (jax.config.jax_platforms or 'tpu').split(',')
  return bool(chips) and 'tpu' in wanted and importlib.util.find_spec('libtpu') is not None


def _join(place: Place, join_timeout: int, lost_timeout: int) -> bool:
  """Connects to the others; returns whether there are any."""
  coordinator, told, _ = place
  # `stop` agrees on when to stop. JAX's own service would take SIGTERM away from Python, and knows
  # steps by their numbers, which begin again with every run of a recipe.
  jax.config.update('jax_enable_preemption_service', False)
  late = f'not all processes of the job joined within --join_timeout={join_timeout} s: start all'
  if coordinator:
    late += f' with --coordinator={coordinator}, and each with its own --process_id'
  # At the end of JAX's own time-out, it aborts.
  alarm = threading.Timer(join_timeout, _leave, [f'{late}.', errors.USER_ERROR])
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      *place,
      # What a launcher around our flags says would hide all GPUs but one.
      cluster_detection_method='deactivate' if coordinator else None,
      initialization_timeout=join_timeout + 60,
      heartbeat_timeout_seconds=lost_timeout,
    )
    count = jax.process_count()
  except (RuntimeError, ValueError, OSError) as error:
    said = ' '.join(str(error).split())
    wrong = f'this process finds no job to join ({said})'
    fix = 'give --coordinator=HOST:PORT, --process_count and --process_id'
    alone = flags.FLAGS.coordinator is None and 'coordinator_address' in said
    require(alone, f'{wrong}: {fix}, or set TPU_SKIP_MDS_QUERY=1 on a TPU that is alone.')
    count = 1  # a TPU that belongs to no pod
  finally:
    alarm.cancel()
  if told not in (None, count):
    said = f'--process_count={told}, but another process says {count}'
    _leave(f'{said}: give every process the same count.', errors.USER_ERROR)
  return count > 1


def _leave(sentence: str, status: int, after: float = 0.0) -> NoReturn:
  """Exits without JAX's shutdown barrier, which the others may never reach."""
  sys.stdout.flush()
  sys.stderr.flush()
  # The sentence comes last, even if JAX's own threads are about to abort in C++.
  stderr = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  os.write(stderr, f'{errors.program_name()}: {sentence}\n'.encode())
  time.sleep(after)
  os._exit(status)
