"""What a run writes and prints, and that it stops at the first loss that is not a number."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from bam_jax import config
from bam_jax.model import block
from bam_jax.train import guard, hooks, log, loss, step, timing
from bam_jax.train.job import Job


def lines(folder: Path) -> list[dict]:
  return list(map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines()))


def events(file: Path) -> list[event_pb2.Event]:
  """What TensorBoard reads: records of a length, the data, and a checksum of either."""
  content, found = file.read_bytes(), []
  while content:
    (size,) = struct.unpack('<Q', content[:8])
    found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


def test_tensorboard_gets_one_curve_for_each_number(tmp_path):
  facts = {'loss': 2.5, 'mfu': None, 'ffn': {'load': [[0.25, 0.75]], 'dropped': [0.5]}}
  with log.Writer(tmp_path, 2) as writer:
    writer.write(3, facts)
    # A line is on disk at once: a kill loses no step.
    assert lines(tmp_path) == [{'step': 3, **facts}]
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
  with log.Writer(tmp_path, 0) as writer:
    for at in (5, 10, 15):
      writer.write(at, {'loss': 1.0})
  with log.Writer(tmp_path, resumed_at) as writer:
    assert [line['step'] for line in writer.dropped] == [
      at for at in (5, 10, 15) if at > resumed_at
    ]
    writer.write(100, {'loss': 0.5})
  assert [line['step'] for line in lines(tmp_path)] == [*kept, 100]


def test_half_a_line_is_dropped(tmp_path):
  # A kill may leave anything of the last line, even all of it but its end.
  for half in ('{"st', '{"step": 5, "loss": 1.0}'):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n' + half)
    with log.Writer(tmp_path, 10) as writer:
      writer.write(11, {'loss': 0.5})
    assert [line['step'] for line in lines(tmp_path)] == [1, 11]


def step_metrics(loss_value=3.0, gradient_norm=0.5, ffn=None, targets=4) -> step.StepMetrics:
  sums = loss.Metrics(np.float32(10), np.int32(targets), block.Routing(None, ffn))
  return step.StepMetrics(np.float32(loss_value), np.float32(gradient_norm), sums)


@pytest.fixture
def record(tmp_path, recipe_dict, models):
  """The function that has a run of ten steps of 64 tokens recorded: hooks, and its log."""
  made = []

  def make(log_every=4, last_good=None, **options):
    intervals, schedule = {'log': log_every}, {'peak_learning_rate': 0.8, 'warmup_steps': 8}
    changes = dict(guard=options, tokens=640, batch_size=4, intervals=intervals, schedule=schedule)
    recipe_dict['runs'] = {'seed': recipe_dict['runs']['seed'] | changes}
    recipe = config.parse(recipe_dict)
    run = recipe.runs['seed']
    job = Job('seed', run, models['dense'], recipe, None, (), tmp_path, None, None)
    made.append(log.Writer(tmp_path, 0))
    steps = log.Log(job, 0, made[-1], timing.Goodput(time.monotonic() - 100.0))
    return hooks.Hooks(guard.Skips('seed', run.guard, lambda: last_good), steps), steps

  yield make
  for writer in made:
    writer.close()


def test_every_log_and_the_last_step_are_written(record, tmp_path):
  made, steps = record()
  for at in range(1, 11):
    made.dispatched(at, step_metrics(loss_value=20 - at))
    assert not lines(tmp_path) or lines(tmp_path)[-1]['step'] < at, 'read one step late'
  made.settle()
  made.settle()
  first, *found = lines(tmp_path)
  assert first['step'] == 1 and first['first_step_seconds'] >= 100
  assert first['first_step_compile_seconds'] == 0
  assert [line['step'] for line in found] == [4, 8, 10]
  assert found[0]['loss'] == 16 and found[0]['nll'] == 2.5
  assert found[0]['learning_rate'] == pytest.approx(0.4), 'of the update that step 4 made'
  assert found[1]['tokens'] == 8 * 64
  assert found[1]['tokens_per_second'] > 0 and found[1]['mfu'] is None
  assert found[1]['goodput'] == found[1]['time']['step'] and found[1]['seconds'] >= 100
  assert sum(found[1]['time'].values()) == pytest.approx(1)
  steps.valid(10, {'law': {'nll': 8.0, 'tokens': 4}})
  assert lines(tmp_path)[-1] == {'step': 10, 'valid': {'law': 2.0}}
