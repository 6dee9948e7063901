"""Disks that are full, that cannot be written, and data that is cut short under a run's feet."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from bam_jax.data import store
from bam_jax.errors import UserError
from bam_jax.prepare import dataset as prepare
from bam_jax.reports import report
from tests.faults.conftest import SEED, assert_sentence, remount
from tests.test_main import assert_same_end, run, start, wait_for_step


@pytest.mark.parametrize('kilobytes', [620, pytest.param(300, marks=pytest.mark.slow)])
def test_a_full_disk_is_a_sentence_and_loses_nothing(text, undisturbed, disk, kilobytes):
  """Of 300 KB not even the first checkpoint fits; of 620 KB the first does."""
  workdir = disk(kilobytes)
  shutil.copytree(undisturbed / 'data', workdir / 'data')
  assert_sentence(run(text, workdir, *SEED), 'bam_jax.main', f'{workdir}/seed', 'cannot be written')
  remount(workdir, 'size=20m')
  again = run(text, workdir, *SEED)
  assert again.returncode == 0, again.stderr
  assert_same_end(workdir, undisturbed, ['seed'])


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_is_refused_before_training(text, undisturbed, disk):
  workdir = disk(20_000)
  shutil.copytree(undisturbed / 'data', workdir / 'data')
  remount(workdir, 'ro')
  done = run(text, workdir, *SEED)
  assert_sentence(done, f'{workdir}/seed cannot be written: Read-only file system')
  assert 'starts' not in done.stderr


def copy_result(undisturbed, workdir) -> None:
  """Copies a run's result, as if it had routers, of which a report has a picture."""
  result = json.loads((undisturbed / 'seed' / 'result.json').read_text())
  for facts in result['domains'].values():
    facts['routing'] = {'ffn': {'load': [[0.5, 0.5]] * 8}}
  (workdir / 'seed').mkdir()
  (workdir / 'seed' / 'result.json').write_text(json.dumps(result))


@pytest.mark.slow
def test_a_report_that_finds_no_room(disk, undisturbed):
  workdir = disk(32)
  copy_result(undisturbed, workdir)
  with pytest.raises(UserError, match='report cannot be written: No space left on device'):
    report.write(workdir, ['seed'])
  assert not list((workdir / 'report').iterdir()), 'whole, or not there'


@pytest.mark.slow
def test_prepare_goes_on_when_there_is_room_again(text, disk, tmp_path):
  inputs = {name: text / name for name in ('general', 'code')}
  small = disk(24)
  with pytest.raises(UserError, match='data.partial/shards.* cannot be written: No space'):
    prepare.prepare(inputs, small / 'data', train_tokenizer=300)
  remount(small, 'size=20m')
  assert prepare.prepare(inputs, small / 'data', train_tokenizer=300) == prepare.prepare(
    inputs, tmp_path / 'data', train_tokenizer=300
  )
  for split in store.open_dataset(small / 'data').splits('code'):
    assert list(store.open_dataset(small / 'data').documents('code', split))


@pytest.mark.slow
@pytest.mark.parametrize('how', ['cut short', 'gone'])
def test_data_that_is_damaged_while_a_run_reads_it(text, undisturbed, tmp_path, how):
  """What is read is read on; what is opened later, the held-out text, is a sentence."""
  shutil.copytree(undisturbed / 'data', tmp_path / 'data')
  running = start(text, tmp_path, *SEED)
  wait_for_step(tmp_path / 'seed', 1, running)
  damaged = [path for path in (tmp_path / 'data').glob('*/valid/tokens/c/**/*') if path.is_file()]
  for path in damaged:
    path.unlink()
    if how == 'cut short':
      path.write_bytes(b'half')
  _, stderr = running.communicate(timeout=60)
  done = subprocess.CompletedProcess([], running.returncode, '', stderr)
  assert_sentence(done, 'valid/tokens is damaged or not whole', 'copy or prepare the dataset')
  assert_sentence(run(text, tmp_path, *SEED), 'valid/tokens is damaged or not whole')
  for path in damaged:
    shutil.copy(undisturbed / path.relative_to(tmp_path), path)
  again = run(text, tmp_path, *SEED)
  assert again.returncode == 0 and 'seed: resumes at step' in again.stderr, again.stderr
  assert_same_end(tmp_path, undisturbed, ('seed',))


@pytest.mark.slow
def test_jobs_that_write_one_report_do_not_disturb_each_other(undisturbed, tmp_path):
  """Whoever reads it finds it whole, at every moment."""
  copy_result(undisturbed, tmp_path)
  code = """
import sys
from bam_jax.reports import report
for _ in range(6):
  report.write(sys.argv[1], ['seed'])
"""
  jobs = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)]) for _ in range(2)]
  read = 0
  while any(job.poll() is None for job in jobs):
    if (tmp_path / 'report' / 'report.json').exists():
      facts = json.loads((tmp_path / 'report' / 'report.json').read_text())
      assert facts['pictures'] and len(facts['rows']) == 1
      for name in facts['pictures']:
        assert (tmp_path / 'report' / name).read_bytes().endswith(b'IEND\xaeB`\x82')
      read += 1
    time.sleep(0.002)
  assert [job.returncode for job in jobs] == [0, 0] and read
  assert {p.name for p in (tmp_path / 'report').iterdir()} == {
    'report.json', 'report.md', 'routing_seed.png',
  }  # fmt: skip
