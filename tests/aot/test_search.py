"""Layouts that a topology allows, and the order in which they are compiled."""

import dataclasses
import itertools

from bam_jax import config
from bam_jax.aot import program, search, topology


def job(model: config.Model, batch_size: int, **changes) -> program.Job:
  run = config.Run(
    label='', init='scratch', data={'general': 1.0}, tokens=16 * batch_size, batch_size=batch_size,
    schedule=config.Schedule(1e-2, 1), **changes,
  )  # fmt: skip
  return program.Job('run', model, run, 16)


def test_meshes_divide_the_model(models):
  eight = topology.parse('v5e:2x4')
  of = lambda model: {dataclasses.astuple(mesh) for mesh in search.meshes(model, eight)}
  assert of(models['dense']) == {
    (data, fsdp, 1, tensor)
    for data, fsdp, tensor in itertools.product([1, 2, 4, 8], repeat=3)
    if data * fsdp * tensor == 8 and tensor <= models['dense'].num_kv_heads
  }
  assert {expert for _, _, expert, _ in of(models['btx'])} == {1, 2, 4}
  assert of(models['btx']) >= {(1, 2, 4, 1), (8, 1, 1, 1)}
  odd = dataclasses.replace(models['dense'], d_model=36)  # 4 cuts, not 8
  assert {fsdp for _, fsdp, *_ in of(odd)} == {1, 2, 4}
  # Only replicas lie in different slices.
  found = search.meshes(models['dense'], topology.parse('v5e:2x2', slices=2))
  assert found and all(mesh.data % 2 == 0 and mesh.size == 8 for mesh in found)


def test_layouts_keep_the_batch_or_take_the_sequences_that_they_are_told(models):
  found = list(search.layouts(job(models['dense'], 32), topology.parse('v5e:2x2'), None))
  assert found and all(layout.run.batch_size == 32 for layout in found)
  for layout in found:
    run = layout.run
    assert layout.sequences_per_chip * run.grad_accum_steps * run.mesh.batch_shards == 32
  fsdp = [layout for layout in found if layout.run.mesh == config.Mesh(fsdp=4)]
  assert {layout.sequences_per_chip for layout in fsdp} == {1, 2, 4, 8}
  assert {layout.run.compute.remat for layout in fsdp} == set(search.REMAT)

  told = search.layouts(job(models['dense'], 32), topology.parse('v5e:2x2'), 3)
  assert {(x.sequences_per_chip, x.run.grad_accum_steps) for x in told} == {(3, 1)}
