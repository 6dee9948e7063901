"""What a run writes about itself, and that it stops at the first loss that is not a number."""

import io
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import block, router
from bam_jax.train import goodput, guard, loss, metrics, record, step
from bam_jax.train.progress import Progress


def lines(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_line_a_step(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  writer.write(5, {'loss': 2.5, 'mfu': None, 'ffn': {'load': [[0.25, 0.75]]}})
  # Each line is on disk at once: a kill loses no step.
  assert lines(tmp_path) == [{'step': 5, 'loss': 2.5, 'mfu': None, 'ffn': {'load': [[0.25, 0.75]]}}]
  writer.write(10, {'valid': {'law': 1.5}})
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [5, 10]
  assert list((tmp_path / 'tensorboard').glob('events*'))


def events(file: Path) -> list[event_pb2.Event]:
  """What TensorBoard reads: records of a length, the data, and a checksum of either."""
  content, found = file.read_bytes(), []
  while content:
    (size,) = struct.unpack('<Q', content[:8])
    found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


def test_tensorboard_gets_one_curve_for_each_number(tmp_path):
  writer = metrics.Writer(tmp_path, 2)
  writer.write(3, {'loss': 2.5, 'mfu': None, 'ffn': {'load': [[0.25, 0.75]], 'dropped': [0.5]}})
  writer.close()
  (file,) = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  version, start, point = events(file)
  assert version.file_version == 'brain.Event:2'
  assert start.step == 3 and start.session_log.status == event_pb2.SessionLog.START
  assert point.step == 3
  assert {value.tag: value.simple_value for value in point.summary.value} == {
    'loss': 2.5,
    'ffn/load/0/0': 0.25,
    'ffn/load/0/1': 0.75,
    'ffn/dropped/0': 0.5,
  }


@pytest.mark.parametrize('resumed_at, kept', [(0, []), (7, [5]), (10, [5, 10]), (99, [5, 10, 15])])
def test_a_resumed_run_drops_what_it_will_do_again(tmp_path, resumed_at, kept):
  writer = metrics.Writer(tmp_path, 0)
  for at in (5, 10, 15):
    writer.write(at, {'loss': 1.0})
  writer.close()
  writer = metrics.Writer(tmp_path, resumed_at)
  writer.write(100, {'loss': 0.5})
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [*kept, 100]


def test_half_a_line_is_dropped(tmp_path):
  # A kill may leave anything of the last line, even all of it but its end.
  for half in ('{"st', '{"step": 5, "loss": 1.0}'):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n' + half)
    writer = metrics.Writer(tmp_path, 10)
    writer.write(11, {'loss': 0.5})
    writer.close()
    assert [line['step'] for line in lines(tmp_path)] == [1, 11]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


def statistics(tokens=8.0) -> router.Statistics:
  """Two layers, three experts."""
  return router.Statistics(
    tokens=np.array([tokens, tokens]),
    load=np.array([[2.0, 6.0, 0.0], [4.0, 4.0, 0.0]]),
    gate=np.ones((2, 3)),
    z=np.ones(2),
    entropy=np.array([4.0, 8.0]),
    dropped=np.array([0.0, 2.0]),
  )


def test_means_over_tokens():
  assert metrics.of_router(statistics()) == {
    'load': [[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]],
    'entropy': [0.5, 1.0],
    'dropped': [0.0, 0.25],
  }
  empty = statistics(0.0)
  assert metrics.of_router(empty._replace(load=0 * empty.load))['load'] == [[0.0] * 3] * 2


def step_metrics(loss_value=3.0, gradient_norm=0.5, ffn=None, targets=4.0) -> step.StepMetrics:
  sums = loss.Metrics(np.float32(10), np.float32(targets), block.Routing(None, ffn))
  return step.StepMetrics(np.float32(loss_value), np.float32(gradient_norm), sums)


def test_of_step():
  facts = metrics.of_step(step_metrics(ffn=statistics()))
  assert facts == {
    'loss': 3.0,
    'nll': 2.5,
    'gradient_norm': 0.5,
    'ffn': metrics.of_router(statistics()),
  }
  json.dumps(facts)
  assert metrics.of_step(step_metrics(targets=0))['nll'] == 10  # no division by nothing
  assert 'attention' not in facts


def test_mfu(monkeypatch):
  assert metrics.mfu(1e9, 1e3, 8) is None  # nobody knows a CPU's peak

  class V5e:
    device_kind = 'TPU v5 lite'

  monkeypatch.setattr(metrics.jax, 'devices', lambda: [V5e()])
  assert metrics.mfu(197e6, 1e6, 4) == pytest.approx(0.25)


@pytest.fixture
def recorder(tmp_path):
  """The function that makes a recorder of a run of ten steps."""
  writers, finished = [], []

  def make(**changes):
    writers.append(metrics.Writer(tmp_path, changes.get('first_step', 0)))
    skips = guard.Skips(
      'seed', changes.pop('guard', config.Guard()), changes.pop('last_good', lambda: None)
    )
    options = dict(
      first_step=0,
      total_steps=10,
      spent=goodput.Goodput(time.monotonic() - 100.0),
      skips=skips,
      done=finished.append,
      step_tokens=64,
      flops_per_token=1e6,
      num_devices=8,
      log_every=4,
      learning_rate=lambda at: 0.5 * at,
    )
    progress = Progress({'seed': 10}, True, Console(file=io.StringIO()))
    return record.Recorder('seed', writers[-1], progress, **(options | changes))

  yield make
  for writer in writers:
    writer.close()


def test_every_log_and_the_last_step_are_written(recorder, tmp_path):
  made = recorder()
  for at in range(1, 11):
    made.step(at, step_metrics(loss_value=20 - at))
    assert not lines(tmp_path) or lines(tmp_path)[-1]['step'] < at, 'read one step late'
  made.settle()
  made.settle()
  first, *found = lines(tmp_path)
  assert first['step'] == 1 and first['first_step_seconds'] >= 100
  assert first['first_step_compile_seconds'] == 0
  assert [line['step'] for line in found] == [4, 8, 10]
  assert found[0]['loss'] == 16 and found[0]['nll'] == 2.5
  assert found[0]['learning_rate'] == 1.5, 'of the update that step 4 made'
  assert found[1]['tokens'] == 8 * 64
  assert found[1]['tokens_per_second'] > 0 and found[1]['mfu'] is None
  assert found[1]['goodput'] == found[1]['time']['step'] and found[1]['seconds'] >= 100
  assert sum(found[1]['time'].values()) == pytest.approx(1)
  assert made.loss == 10


def test_held_out_losses_are_a_line(recorder, tmp_path):
  recorder().valid(3, {'law': 2.0})
  assert lines(tmp_path) == [{'step': 3, 'valid': {'law': 2.0}}]


@pytest.mark.parametrize('bad', [{'loss_value': math.nan}, {'gradient_norm': math.inf}], ids=str)
def test_a_run_that_diverges_names_the_last_good_checkpoint(recorder, tmp_path, bad):
  made = recorder(last_good=lambda: Path('/runs/seed/checkpoints/4'), log_every=1)
  made.step(6, step_metrics())
  made.step(7, step_metrics(**bad))
  with pytest.raises(guard.Diverged) as caught:
    made.step(8, step_metrics())
  message = str(caught.value)
  for word in ('runs.seed', 'step 7', '/runs/seed/checkpoints/4', 'peak_learning_rate'):
    assert word in message
  assert [line['step'] for line in lines(tmp_path)] == [6], 'what is no number is not written'


def test_a_skipped_step_is_counted_and_its_loss_is_not_written(recorder, tmp_path):
  made = recorder(guard=config.Guard(on_nan='skip', max_skipped=2), log_every=1)
  for at, loss_value in enumerate((3.0, math.nan, math.inf, 2.0, math.nan), 1):
    made.step(at, step_metrics(loss_value=loss_value))
  made.settle()
  first, *found = lines(tmp_path)
  assert [(line['step'], line['skipped'], line.get('loss')) for line in found] == [
    (1, 0, 3.0),
    (2, 1, None),
    (3, 2, None),
    (4, 2, 2.0),
    (5, 3, None),
  ]
  assert made.loss == 2.0


def test_a_run_that_diverges_before_any_checkpoint(recorder):
  made = recorder()
  made.step(1, step_metrics(loss_value=math.nan))
  with pytest.raises(guard.Diverged, match='no checkpoint was saved'):
    made.settle()


def test_nothing_is_saved_of_a_run_that_diverged(recorder):
  """`settle` raises before the caller saves; the exception is a user's mistake, exit status 2."""
  made = recorder()
  made.settle()
  made.step(1, step_metrics(gradient_norm=math.nan))
  with pytest.raises(UserError):
    made.settle()
