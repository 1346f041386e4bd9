"""One cache for all data tests, so that glyphs are rendered once and the user's is left be."""

import pytest


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('MOEJAX_CACHE', str(folder))
    yield folder
