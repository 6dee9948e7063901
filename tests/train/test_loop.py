"""The loop never waits for the devices, and sends them nothing but what it means to."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.model import block
from bam_jax.recipes import runner
from bam_jax.train import heldout, loss
from bam_jax.train import step as step_lib


class Late:
  """A number of a step that is not there before the next step was dispatched."""

  def __init__(self, value: float, step: int, dispatched: list):
    self.value, self.step, self.dispatched = value, step, dispatched

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    assert len(self.dispatched) in (self.step + 1, 6), f'step {self.step} is waited for'
    return np.asarray(self.value, np.float32)


@pytest.fixture
def train(tmp_path, dataset, recipe_dict, monkeypatch):
  """The function that trains six steps, each of them a function of (its number, its inputs)."""

  def run(extra=lambda step, inputs: None, **watch) -> list:
    dispatched = []

    def step(state, batch, learning_rates):
      dispatched.append((batch, learning_rates))
      number = len(dispatched)
      extra(number, (batch, learning_rates))
      late = [Late(value, number, dispatched) for value in (3.0, 0.5, 6.0, 2.0)]
      sums = loss.Metrics(late[2], late[3], block.Routing(None, None))
      return state, step_lib.StepMetrics(late[0], late[1], sums)

    monkeypatch.setattr(step_lib, 'train_step', lambda *options: step)
    monkeypatch.setattr(heldout, 'evaluate', lambda *options: {})
    recipe_dict['runs'] = {'seed': recipe_dict['runs']['seed'] | {'intervals': {'log': 1}}}
    recipe_dict['runs']['seed'] |= {'mesh': {'fsdp': 2}, 'watch': watch}
    runner.execute(config.parse(recipe_dict), tmp_path, dataset)
    return dispatched

  return run


def test_no_step_waits_for_the_one_before(train, tmp_path):
  dispatched = train()
  assert len(dispatched) == 6
  assert len((tmp_path / 'seed' / 'metrics.jsonl').read_text().splitlines()) == 8
  for inputs in dispatched:
    for leaf in jax.tree.leaves(inputs):
      assert isinstance(leaf, jax.Array) and leaf.committed and len(leaf.devices()) == 2
    assert inputs[1].dtype == np.float32 and inputs[1].shape == (2,)


def test_a_transfer_that_nobody_asked_for_raises(train):
  def send(step, inputs):
    if step == 3:
      jnp.add(inputs[1], np.ones(2, np.float32))

  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    train(send)


def test_a_stall_prints_the_stack_of_every_thread(train, capfd):
  def hang(step: int, inputs: tuple) -> None:
    time.sleep(2.0 if step == 3 else 0.0)

  train(hang, stall_seconds=0.5)  # which counts as a second
  told = capfd.readouterr().err
  assert 'Timeout (0:00:01)!' in told and told.count('Thread 0x') > 1
  assert 'in hang' in told
  time.sleep(1.1)
  assert capfd.readouterr().err == '', 'a run that has ended cannot stall'
