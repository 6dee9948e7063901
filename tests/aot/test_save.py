"""A step on disk is the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.aot import program, save
from bam_jax.errors import UserError
from bam_jax.parallel import sharding
from bam_jax.train import step


def test_what_is_loaded_computes_the_same(models, make_batch, tmp_path):
  run = config.Run(
    label='', init='scratch', data={'general': 1.0}, tokens=256, batch_size=8,
    schedule=config.Schedule(1e-2, 1), mesh=config.Mesh(fsdp=2),
  )  # fmt: skip
  job, mesh = program.Job('seed', models['btx'], run, 16), sharding.make_mesh(run.mesh)
  compiled = program.compile_step(job, mesh)
  save.executable(compiled, str(tmp_path / 'step'))
  loaded = save.load(str(tmp_path / 'step'), mesh)

  def outcome(function):
    abstract = step.abstract_state(job.model, run.compute, run.optimizer, mesh)
    state = jax.tree.map(
      lambda x: jax.device_put(jnp.full(x.shape, 0.01, x.dtype), x.sharding), abstract
    )
    return function(state, sharding.put_batch(make_batch(8, 16), mesh), 0.5)

  for a, b in zip(jax.tree.leaves(outcome(loaded)), jax.tree.leaves(outcome(compiled.executable))):
    np.testing.assert_array_equal(a, b)


def test_mistakes(tmp_path):
  refused = program.TooLarge(None, 'too much', 1.0)
  with pytest.raises(UserError, match='--save=x has nothing to write: the step does not fit'):
    save.executable(refused, 'x')
  compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
  step = program.Compiled(compiled, None, 0.0, 0.0)
  with pytest.raises(UserError, match='--hlo=.* cannot be written: No such file or directory'):
    save.text(step, str(tmp_path / 'nowhere' / 'file'))
