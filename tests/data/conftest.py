"""One cache for all data tests: glyphs are rendered once, and the user's cache stays as it is."""

import os

import pytest


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent   # of all workers
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('MOEJAX_CACHE', str(folder / 'cache'))
    yield
