"""Files and folders of a bucket, by the functions that do the same on a disk."""

import pytest
import tensorstore as ts

from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.train import log
from tests.gcs.conftest import files


def test_what_others_write_is_seen(folder):
  """As the arrays are, which go another way than the listings."""
  folders.write_file(folder / '3' / 'meta', '')
  assert [path.name for path in folder.iterdir()] == ['3']
  name = f'{folder.name}/7/meta'
  ts.KvStore.open({'driver': 'gcs', 'bucket': 'bucket', 'path': name}).result().write(
    '', b'x'
  ).result()
  assert sorted(path.name for path in folder.iterdir()) == ['3', '7']
  assert sorted(path.name for path in folder.glob('*')) == ['3', '7']


def test_growing_files_are_sent_whole(folder):
  metrics = folder / 'metrics.jsonl'
  with log.Writer(folder, 0) as writer:
    writer.write(1, {'loss': 3.0})
    assert files(folder) == []
    writer.flush()
    assert metrics.read_text() == '{"step": 1, "loss": 3.0}\n'
    writer.write(2, {'loss': 2.0})
  assert metrics.read_text().splitlines()[1] == '{"step": 2, "loss": 2.0}'
  _, events = files(folder)
  assert events.startswith('tensorboard/events.out.tfevents.')
  with log.Writer(folder, 1) as writer:
    assert writer.dropped == [{'step': 2, 'loss': 2.0}]


def test_a_large_file_comes_in_parts(folder, tmp_path):
  content = bytes(range(256)) * 4 * 2**13 * 2 + b'and more'  # 16 MB, an upload of several requests
  (tmp_path / 'a b').mkdir()
  (tmp_path / 'a b' / 'c').write_bytes(content)
  folders.send(tmp_path, folder, ['a b/c'])
  assert (folder / 'a b' / 'c').read_bytes() == content
  folders.write_file(folder / 'd', content)
  assert (folder / 'd').read_bytes() == content


def test_a_folder_is_new_and_gone_when_its_block_fails(folder):
  with pytest.raises(RuntimeError), folders.new_folder(folder / 'made') as made:
    (made / 'params').write_text('half')
    raise RuntimeError
  assert files(folder) == []
  with folders.new_folder(folder / 'made') as made:
    (made / 'params').write_text('all')
  with pytest.raises(UserError, match='exists'), folders.new_folder(folder / 'made'):
    pass
