"""Trains the selected runs of a recipe in order, skipping those that are finished."""

import functools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bam_jax import checkpoint, config
from bam_jax.checkpoint import manifest
from bam_jax.config import strict
from bam_jax.data import store
from bam_jax.errors import UserError
from bam_jax.files import claims, folders, json_file
from bam_jax.model import arithmetic
from bam_jax.parallel import processes
from bam_jax.recipes import graph, start
from bam_jax.train import log, loop, stop
from bam_jax.upcycle import rules


def execute(
  recipe: config.Recipe, workdir: Path, dataset: store.Dataset, only: Sequence[str] = ()
) -> None:
  """Trains the unfinished runs among `only`, or of all, in order.

  Every run has a folder in `workdir`, which may be in a bucket. UserError before anything is
  trained, if a recipe cannot run here or does not match the workdir; during training, for a NaN
  loss. stop.Stopped after a signal, with the run's state saved.
  """
  began = time.monotonic()
  nodes = graph.resolve(recipe, graph.digest(dataset.manifest['domains']))
  identities = {name: node.identity for name, node in nodes.items()}
  everything = graph.digest([config.to_dict(recipe), identities, list(only)])
  processes.same(everything, 'recipe, flags and data')
  asked = processes.decide(lambda: _asked(nodes, only, workdir))
  domains = graph.check(recipe, nodes, dataset, asked)
  with stop.catch() as stopping, claims.Claims(log.note, stopping.check) as held:
    claim = functools.partial(_claim, held, [nodes[name] for name in asked], workdir, domains)
    unfinished = processes.decide(claim)
    if isinstance(unfinished, int):
      raise stop.Stopped(unfinished)
    for name in asked:
      if name not in unfinished:
        log.note(f'{name}: skipped, already finished')
        continue
      node, folder = nodes[name], workdir / name
      if warning := rules.warning(node.model):
        log.note(f'{name}: {warning}')
      record = {'recipe': recipe.name, 'run': config.to_dict(node.run), 'identity': node.identity}
      _write_json(folder / 'config.json', record | {'hash': graph.digest(node.identity)})
      if jax.process_index() == 0:  # beside the checkpoints, which may outlive the data
        dataset.tokenizer().save(folder)
      job = loop.Job(
        name=name,
        run=node.run,
        model=node.model,
        recipe=recipe,
        dataset=dataset,
        domains=domains,
        folder=folder,
        init=functools.partial(start.initial_params, recipe, nodes, node, workdir, dataset),
        meta=functools.partial(_meta, recipe, node, dataset, _manifest(recipe, node, workdir)),
      )
      facts = loop.train(job, stopping, began)
      began = time.monotonic()
      _write_json(folder / 'result.json', _result(recipe, node) | facts)


def write_command(workdir: Path, recipe: config.Recipe, command: str) -> None:
  """Records the command that made this workdir, for the report."""
  facts = {'name': recipe.name, 'command': command, 'seed': recipe.seed}
  facts['devices'] = f'{jax.device_count()} {jax.devices()[0].device_kind}'
  facts['versions'] = {'Python': platform.python_version(), **manifest.versions()}
  _write_json(workdir / 'recipe.json', facts)


def _asked(nodes: Mapping[str, graph.Node], only: Sequence[str], workdir: Path) -> list[str]:
  for name in only:
    if name not in nodes:
      raise UserError(f'--runs names {name!r}; the recipe has {", ".join(nodes)}.')
  asked = [name for name in nodes if not only or name in only]
  for name in asked:
    for parent in config.parents(nodes[name].run):
      if parent not in asked and not _is_finished(workdir, nodes[parent]):
        missing = f'{workdir / parent} has no finished run of this configuration'
        wrong = f'--runs has {name!r}, which starts from {parent!r}, but {missing}'
        raise UserError(f'{wrong}: add {parent!r} to --runs.')
  return asked


def _claim(held: claims.Claims, nodes, workdir: Path, domains) -> list[str] | int:
  """Claims the folders of unfinished runs; returns their names, or the signal received."""
  unfinished = lambda: [one.name for one in nodes if not _is_finished(workdir, one, domains)]
  try:
    held.take(workdir / name for name in unfinished())
  except stop.Stopped as stopped:
    return stopped.signum
  for node in nodes:
    _check_identity(workdir / node.name, node)
  return unfinished()  # another job may have finished some meanwhile


def _is_finished(workdir: Path, node: graph.Node, domains: Sequence[str] = ()) -> bool:
  """Whether a run has its final checkpoint, with this configuration, and results on `domains`."""
  folder = workdir / node.name
  recorded = json_file.load_record(folder / 'config.json') or {}
  result = json_file.load_record(folder / 'result.json')
  return (
    checkpoint.finished_step(folder / 'checkpoints') == node.identity['total_steps']
    and result is not None
    and set(domains) <= set(result['domains'])
    and recorded.get('hash') == graph.digest(node.identity)
  )


def _check_identity(folder: Path, node: graph.Node) -> None:
  recorded = json_file.load_record(folder / 'config.json')
  if recorded is None or recorded['hash'] == graph.digest(node.identity):
    return
  changes = strict.differences(recorded['identity'], json.loads(json.dumps(node.identity)))
  more = f'; and {len(changes) - 3} more' if len(changes) > 3 else ''
  begun = f'{folder} was started with another configuration of {node.name!r}'
  fix = 'undo the change, choose another --workdir, or delete that folder.'
  raise UserError(f'{begun} ({"; ".join(changes[:3])}{more}): {fix}')


def _meta(recipe: config.Recipe, node: graph.Node, dataset, made, step: int) -> checkpoint.Meta:
  return checkpoint.Meta(
    format=checkpoint.FORMAT,
    model=node.model,
    sequence_length=recipe.data.sequence_length,
    tokenizer_hash=dataset.tokenizer_hash,
    tokenizer_path=str(folders.absolute(recipe.data.path)),
    run=node.name,
    step=step,
    method=node.method,
    sources=node.experts,
    versions=manifest.versions(),
    bos_token=dataset.manifest['tokenizer']['bos_token'],
    eos_token=dataset.manifest['tokenizer']['eos_token'],
    manifest=made,
  )


def _manifest(recipe: config.Recipe, node: graph.Node, workdir: Path) -> manifest.Manifest | None:
  """What a run's first parameters were made from; hashes would require reading it again."""
  if node.run.init == 'scratch':
    return None
  if isinstance(node.run.init, config.FromCheckpoint):
    origins = (manifest.Source(node.run.init.checkpoint),)
  else:
    path = lambda name: str(folders.absolute(workdir / name))
    names = config.parents(node.run)
    origins = tuple(manifest.Source(path(n), n, recipe.total_steps(n)) for n in names)
  upcycle, grown = node.upcycle, None
  made = rules.rules(node.model, upcycle.norms) if upcycle else ()
  if node.kind == 'mixture' and not upcycle:  # how the mixture that it starts from was made
    meta = node.origin.meta if node.origin else checkpoint.read_meta(workdir / names[0])
    before = meta.manifest
    upcycle, grown = (before.upcycle, before.grown) if before else (None, None)
    if isinstance(node.run.init, config.FromGrow):
      experts = (*range(len(node.experts) - 1), manifest.NEW)
      grown = manifest.Grown(experts, meta.sources, before)
  now, seed, name = manifest.now(), recipe.seed, node.name
  return manifest.Manifest('', now, origins, made, upcycle, seed, name, grown)


def _result(recipe: config.Recipe, node: graph.Node) -> dict[str, Any]:
  counts = arithmetic.parameters(node.model)
  return {
    'run': node.name,
    'label': node.run.label,
    'kind': node.kind,
    'method': node.method,
    'sources': list(node.experts),
    'parameters': counts.total,
    'active_parameters': counts.active,
    'flops_per_token': arithmetic.training_flops(node.model, recipe.data.sequence_length),
  }


def _write_json(path: Path, facts: dict[str, Any]) -> None:
  if jax.process_index() == 0:
    with folders.writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
    folders.write_file(path, json.dumps(facts, indent=1) + '\n')
