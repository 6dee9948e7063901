"""How a job begins, and what it refuses before anything is trained."""

import pytest

from tests.distributed.jobs import MAIN, MESH, ROOT, Job, free_port, job

REFUSED = {
  'mesh': (
    MESH,
    '--config.runs.code.mesh.expert=1',
    'config.runs.code.mesh has 1 devices, but the 2 processes have 2: the mesh must contain every '
    'device of the job.',
  ),
  'parts': (
    '3x1x1x2',
    '',
    'config.runs.seed.mesh gives processes overlapping parts of a batch: choose mesh.tensor such '
    'that it divides the 3 devices of a process, or is a multiple of them.',
  ),
  'recipe': (
    MESH,
    '--config.seed={process}',
    'processes 1 do not have the same recipe, flags and data as process 0: start all processes '
    'with the same flags and files.',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', REFUSED)
def test_all_refuse_what_one_cannot_do(text, tmp_path, name):
  mesh, flags, sentence = REFUSED[name]
  with job(tmp_path, text, 2, mesh, *flags.split()) as both:
    ends = both.ends()
  for process, (status, told) in enumerate(ends):
    assert status == 2
    assert told.splitlines()[-1] == f'bam_jax.main: {sentence.format(process=process)}'
    assert 'Traceback' not in told


@pytest.mark.slow
@pytest.mark.parametrize('process', (0, 1))
def test_nobody_else_comes(tmp_path, process):
  """A wrong address, or the others were never started."""
  address = f'127.0.0.1:{free_port()}'
  line = [*MAIN, '--config=configs/quickstart.py', f'--workdir={tmp_path}', '--join_timeout=3']
  place = [f'--coordinator={address}', '--process_count=2', f'--process_id={process}']
  [(status, told)] = Job([[*line, *place]], devices=1).ends()
  assert status == 2
  assert told == (
    'bam_jax.main: not all processes of the job joined within --join_timeout=3 s: start all with '
    f'--coordinator={address}, and each with its own --process_id.\n'
  )


def slurm(process: int, number: int) -> dict[str, str]:
  return {
    'SLURM_JOB_ID': str(number), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(process), 'SLURM_LOCALID': str(process),
  }  # fmt: skip


@pytest.mark.slow
def test_auto_finds_what_a_launcher_says(text, tmp_path):
  """The variables of SLURM, without the launcher: the job gets as far as its recipe's mesh."""
  recipe = f'--config={ROOT}/tests/assets/job.py:{text},12,4x1x1x1'
  line = [*MAIN, recipe, f'--workdir={tmp_path}', '--coordinator=auto']
  number = free_port() % 4096  # from which JAX makes a port
  variables = [slurm(process, number) for process in range(2)]
  for status, told in Job([line] * 2, 1, variables).ends():
    assert status == 2
    assert 'config.runs.seed.mesh requires 4 devices, but there are 2' in told
