"""A job of several processes does what one process with as many devices does."""

import functools

import numpy as np
import pytest

from tests.distributed.jobs import MESH, assert_same_bits, job, losses, params_of, result

RUNS = ('seed', 'code', 'bam')


@pytest.fixture(scope='module')
def alone(text, tmp_path_factory):
  """The function mesh -> workdir of one process that trained the whole graph on it."""

  @functools.cache
  def workdir(mesh):
    folder = tmp_path_factory.mktemp('alone')
    with job(folder, text, 1, mesh) as one:
      one.succeeds()
    return folder

  return workdir


@pytest.mark.slow
def test_two_processes(text, alone, tmp_path):
  """The whole graph, evaluated, with an upcycling that reads both processes' data.

  Two devices' sums have one order: not even the last bit may differ.
  """
  with job(tmp_path, text, 2, MESH) as both:
    first, second = both.succeeds()
  assert 'bam: done' in first and second == '', 'only process 0 tells'
  for name in RUNS:
    assert_same_bits(tmp_path / name, alone(MESH) / name)


@pytest.mark.slow
@pytest.mark.parametrize('processes, mesh', [(4, '2x1x2x1')])
def test_more_processes_and_meshes(text, alone, tmp_path, processes, mesh):
  """`tensor` over processes among them, which then read the same rows.

  The network adds four devices' sums in an order of its own.
  """
  with job(tmp_path, text, processes, mesh) as several:
    several.succeeds()
  for name in RUNS:
    mine, other = params_of(tmp_path / name), params_of(alone(mesh) / name)
    for path in other:
      np.testing.assert_allclose(mine[path], other[path], rtol=0, atol=1e-5, err_msg=path)
    mine, other = losses(tmp_path / name), losses(alone(mesh) / name)
    assert mine.keys() == other.keys()
    np.testing.assert_allclose([*mine.values()], [*other.values()], rtol=2e-6)
    mine, other = result(tmp_path / name), result(alone(mesh) / name)
    for domain in other:
      assert mine[domain]['tokens'] == other[domain]['tokens']
      assert mine[domain]['bytes'] == other[domain]['bytes']
      assert mine[domain]['nll'] == pytest.approx(other[domain]['nll'], rel=1e-6)
