"""Which place in which job the flags say."""

import jax
import pytest

from bam_jax.errors import UserError
from bam_jax.parallel import distributed
from bam_jax.parallel.distributed import place_of

MISTAKES = {
  'no coordinator': ((None, 2, 0), 'require --coordinator'),
  'no count': (('host:1', None, 0), 'requires --process_count'),
  'no id': (('host:1', 2, None), 'requires --process_count'),
  'id too high': (('host:1', 2, 2), 'not below --process_count=2'),
  'no port': (('host', 2, 0), 'is not HOST:PORT'),
  'odd port': (('host:99999', 2, 0), 'is not HOST:PORT'),
  'auto and more': (('auto', 2, None), 'omit them'),
}


@pytest.mark.parametrize('name', MISTAKES)
@pytest.mark.parametrize('pod', (False, True))
def test_flags_that_do_not_fit_together(name, pod):
  values, sentence = MISTAKES[name]
  with pytest.raises(UserError, match=sentence):
    place_of(*values, pod=pod)


def test_a_pod_needs_chips_their_library_and_jax_to_want_them(tmp_path, monkeypatch):
  found = {'libtpu': object()}
  monkeypatch.setattr(distributed.importlib.util, 'find_spec', found.get)
  before = jax.config.jax_platforms
  try:
    for wanted, expected in ((None, True), ('tpu,cpu', True), ('cpu', False)):
      jax.config.update('jax_platforms', wanted)
      for chip in ('accel0', 'vfio/0'):
        devices = tmp_path / f'{wanted}{chip[:4]}'
        (devices / chip).parent.mkdir(parents=True)
        (devices / chip).touch()
        assert distributed.has_tpu(devices) == expected
    jax.config.update('jax_platforms', None)
    (tmp_path / 'vfio').mkdir()
    (tmp_path / 'vfio' / 'vfio').touch()  # there on every machine that can pass devices through
    assert not distributed.has_tpu(tmp_path)
    (tmp_path / 'accel0').touch()
    assert distributed.has_tpu(tmp_path)
    found.clear()
    assert not distributed.has_tpu(tmp_path)
  finally:
    jax.config.update('jax_platforms', before)
