"""`convert mix`, and `convert upcycle` with routers fitted on text, as their users run them."""

import json

import numpy as np
import pytest

from tests.hf import folders

FROM = '--from=seed', '--from=hub', '--from=law'
TOKENS = '--router_tokens=300'


@pytest.fixture(scope='module')
def world(server, tmp_path_factory):
  """Two checkpoints, a folder of transformers, and text in three shapes."""
  folder = tmp_path_factory.mktemp('world')
  for number, name in enumerate(('seed', 'law')):
    model = folders.make_model()
    folders.write_checkpoint(folder / name, model, folders.draw(model, number), run=name)
  folders.write_hf(folder / 'hub', folders.CONFIG, folders.cohere_tensors(folders.CONFIG, 7))
  rng = np.random.default_rng(0)
  for name, letters in {'general': 'abcdef', 'code': 'defghi', 'law': 'xyz'}.items():
    (folder / 'text' / name).mkdir(parents=True)
    texts = [''.join(rng.choice(list(letters), 60)) for _ in range(16)]
    for split, some in {'train': texts[:12], 'valid': texts[12:]}.items():
      lines = ''.join(json.dumps({'text': text}) + '\n' for text in some)
      (folder / 'text' / name / f'{split}.jsonl').write_text(lines)
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  run(server, folder, 'prepare', '--input=text', '--output=data', '--tokenizer=seed')
  return folder


def run(server, world, command: str, *flags: str) -> dict:
  done = server.run(command, *flags, '--json=-', folder=world)
  assert done.status == 0, done.stderr
  return json.loads(done.stdout)


def test_a_mixture_in_one_command(server, world):
  """Scored as `evaluate` does, beside each source; the same as `upcycle` with those options."""
  data = 'general=data', 'code=text/code', 'law=data'
  facts = run(
    server, world, 'convert mix', *FROM, *(f'--data={one}' for one in data), TOKENS, '--output=mix'
  )
  model = facts['meta']['model']
  assert model['router_input'] == 'prefix' and model['ffn_experts']['renormalize']
  assert model['attention_experts']['top_k'] == 1 and not model['attention_experts']['shared_kv']
  checkpoints = [f'--checkpoint={path}' for path in ('mix', 'seed', 'law')]
  want = run(server, world, 'evaluate', *checkpoints, '--data=data', '--window=64')
  rows = {row['checkpoint']: row['domains'] for row in want['rows']}
  found = {row['domain']: row['scores'] for row in facts['domains']}
  value = lambda score: score['perplexity']['value']
  for domain in ('general', 'code', 'law'):
    assert value(found[domain]['mixture']) == value(rows['mix'][domain]), domain
  assert value(found['general']['source']) == value(rows['seed']['general'])
  assert value(found['law']['source']) == value(rows['law']['law'])
  assert [row['source'] for row in facts['domains']] == ['seed', 'hub', 'law']
  mean = np.mean([value(scores['mixture']) for scores in found.values()])
  assert facts['average']['mixture'] == pytest.approx(mean)

  flags = '--method=bam_kv_experts', '--attention_routing=top1', '--renormalize', TOKENS
  flags += '--router_input=prefix', '--router_memory=16', '--router_init=ridge'
  flags += '--router_scale=8', '--output=same'
  # By the name of a run, whatever the order; the others in theirs.
  named = [f'--router_data={data[number]}' for number in (2, 0, 1)]
  run(server, world, 'convert upcycle', *FROM, *flags, *named)
  same = folders.read_checkpoint(world / 'same')
  for path, array in folders.read_checkpoint(world / 'mix').items():
    np.testing.assert_array_equal(array, same[path], err_msg=path)


def test_text_without_splits_is_scored_where_routers_were_not_fitted(server, world):
  data = [f'--data={name}={name}.jsonl' for name in ('general', 'code', 'law')]
  flags = *FROM, *data, '--method=btx', '--router_init=centroids', '--router_tokens=100'
  facts = run(server, world, 'convert mix', *flags, '--output=halves', '--max_documents=3')
  assert [row['scores']['mixture']['documents'] for row in facts['domains']] == [3, 3, 3]
  assert facts['meta']['model']['attention_experts'] is None
  router_LDE = folders.read_checkpoint(world / 'halves')['blocks/ffn/router']
  np.testing.assert_allclose(np.linalg.norm(router_LDE, axis=1), 8, rtol=1e-5)


DATA = '--data=general=data', '--data=code=text/code', '--data=law=law.jsonl'
FITTED = '--method=btx', '--router_init=ridge'


@pytest.mark.parametrize('command, flags, sentence', [
  ('mix', [], '--data has no text for the source seed, hub, law: give --data=NAME=PATH once for'),
  ('mix', DATA[:2], '--data has no text for the source law: give'),
  ('mix', [*DATA, '--data=x=law.jsonl'], '--data=x belongs to no source'),
  ('mix', [*DATA[:2], '--data=law.jsonl'], '--data=law.jsonl is not NAME=PATH'),
  ('mix', DATA, 'tokens of general to fit routers on: give more text than --router_tokens=32768'),
  ('mix', [*DATA[1:], '--data=math=data', TOKENS], "data has no domain 'math'"),
  ('mix', [*DATA, '--method=average'], 'make no mixture with fitted routers: run convert upcycle'),
  ('mix', [*DATA, TOKENS, '--mesh=fsdp=8'], 'requires 8 devices, but there are 1'),
  ('upcycle', FITTED, '--router_data has no text for the source seed'),
  ('upcycle', ['--method=btx', '--router_data=law=data'], 'no effect with --router_init=random'),
])  # fmt: skip
def test_mistakes_are_one_sentence(server, world, command, flags, sentence):
  line = f'convert {command}', *FROM, '--output=x', *flags
  server.run(*line, folder=world).check().refused(sentence)
  assert not (world / 'x').exists()
