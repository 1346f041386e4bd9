"""One cache for all data tests: glyphs are rendered once, and the user's cache stays as it is."""

import pytest


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('MOEJAX_CACHE', str(folder))
    yield folder
