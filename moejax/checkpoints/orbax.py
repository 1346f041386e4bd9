"""moejax's own checkpoints: Orbax, one directory per step under WORKDIR/checkpoints.

The directory of a step has `state` (a nested dict of arrays), `extra` (JSON) and the digests of all
their files. Orbax writes it under a temporary name and renames it when complete. It counts as
finished only if its metadata has the commit time, which a killed save has not. Digests are compared
before a step is read, so a directory that was copied in part is refused. Earlier versions of moejax
saved no digests.
"""

import contextlib
import gc
import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from moejax import trees
from moejax.checkpoints import digests
from moejax.config import ConfigError, check, fail

Tree = trees.Tree
SUBDIR = 'checkpoints'
_COMMIT_FILE = '_CHECKPOINT_METADATA'
_DIGESTS = 'digests'   # key in `extra`: digests were saved, so their file must be there
_PATTERN = '[]*?\\'
_STEP = 'step'         # leaf of a train state
_AHEAD = 2**25     # bytes read at once where leaves are small, see Reader._read_from
_GARBAGE = 2**27   # bytes read between garbage collections, see there too


def _copy_again(older: list[int]) -> str:
  """What to do about damage if the use of the checkpoint is unknown."""
  return 'Take one of these, or copy it again.' if older else 'Copy it again.'


class Writer:
  """Saves states by step, asynchronously, and restores them.

  Args:
    workdir: checkpoints go to workdir/checkpoints, made if missing.
    keep: number of last steps to keep.
    keep_steps: steps to keep forever (the trunk that later runs branch from).

  Attributes:
    aside: new names of the unfinished step directories that were found; [] but in process 0.

  Raises:
    ConfigError: keep below 1, or a directory that cannot be written.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int, keep_steps: Collection[int] = ()):
    check(keep >= 1, 'checkpoint.keep', keep, '1 or more',
          'The last checkpoint is needed to resume.')
    self.directory = _absolute(workdir) / SUBDIR
    policy = checkpoint_managers.AnyPreservationPolicy([
        checkpoint_managers.LatestN(n=keep),
        checkpoint_managers.CustomSteps(steps=sorted(keep_steps))])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests))
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self.aside = _set_unfinished_aside(self.directory)
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    except OSError as error:
      fail('workdir', str(workdir), 'a directory that can be written',
           f'{type(error).__name__}: {error}. Choose another workdir.')

  def save(self, step: int, state: Tree) -> bool:
    """Starts to save, and returns once state's arrays may be donated or overwritten.

    Args:
      step: number of updates in the state; names the checkpoint.
      state: nested dict of jax or numpy arrays; keys without '.' or '/'.

    Returns:
      False if this step is already saved (a state is a function of its step), else True.

    Raises:
      ValueError: a key or leaf that a restore would change.
      Exception: an earlier asynchronous save failed.
    """
    if step in self._manager.all_steps():
      return False
    trees.flatten(state)   # raises unless every key is a str without '/'
    state = trees.map_with_path(_savable, state)
    self._manager.wait_until_finished()
    self._saving = step
    self._manager.save(step, force=True, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), extra=ocp.args.JsonSave({_DIGESTS: True})))
    return True

  def _write_digests(self) -> None:
    """Called when all files of a step are written, before its directory gets its final name."""
    if jax.process_index() == 0:
      [directory] = [d for d in self.directory.iterdir() if d.name == str(self._saving)
                     or d.name.startswith(f'{self._saving}.orbax-checkpoint-tmp')]
      digests.write(directory, self._saving)

  def wait(self) -> None:
    """Blocks until all saves are finished. Raises the error of one that failed."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits as `wait` does, then ends the manager's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def latest_step(self) -> int | None:
    """The last finished step, or None."""
    steps = finished_steps(self.directory)
    return steps[-1] if steps else None

  def restore(self, step: int, like: Tree) -> Tree:
    """`Reader.restore` of a finished step of this writer. Raises ConfigError as Reader does."""
    def remedy(older: list[int]) -> str:
      return f'Start again after {set_away(step, older, "the run")}.'
    return Reader(self.directory, step, remedy=remedy).restore(like)


class Reader:
  """Reads a finished checkpoint leaf by leaf, or as a whole.

  Args:
    directory: a run's workdir, its checkpoints directory, or the directory of a step.
    step: which step; None: the last finished one.
    key: the config key that names the directory, for messages about damage.
    remedy: older finished steps -> the part of such a message that advises what to do.

  Attributes:
    step: the step that is read.
    shapes: {path: ShapeDtypeStruct} of the state's leaves.

  Raises:
    ConfigError: there is no such directory, finished checkpoint or step; or, in this and every
      other method, files of the step are damaged.
  """

  def __init__(self, directory: str | os.PathLike, step: int | None = None,
               key: str = 'checkpoint', remedy: Callable[[list[int]], str] = _copy_again):
    root = _absolute(directory)
    if root.name.isdigit() and (root / 'state').exists():
      check(step in (None, int(root.name)), 'checkpoint.step', step, root.name,
            f'{root} is the directory of that one step.')
      root, step = root.parent, int(root.name)
    elif (root / SUBDIR).exists():
      root = root / SUBDIR
    if not root.exists():
      fail('checkpoint', str(directory), "an existing run's workdir",
           'No such directory; run the parent first, or correct the path.')
    steps = finished_steps(root)
    if not steps:
      fail('checkpoint', str(directory), 'a directory with a finished checkpoint',
           f'None is finished in {root}; let the parent run reach a save.')
    self.step = steps[-1] if step is None else int(step)
    if self.step not in steps:
      fail('checkpoint.step', step, ', '.join(map(str, steps)),
           f'These are the finished steps in {root}.')
    self._directory = root / str(self.step) / 'state'
    self._key, self._remedy = key, remedy
    self._verified = (self._directory.parent / digests.FILE).exists()
    if self._verified and (reason := digests.damage(self._directory.parent, self.step)):
      self._refuse(f'It is damaged: {reason}.')
    self._handler = ocp.PyTreeCheckpointHandler()
    self._garbage, self._ahead = 0, {}
    with self._reading():
      extra = ocp.JsonCheckpointHandler().restore(self._directory.parent / 'extra')
      metadata = trees.flatten(self._handler.metadata(self._directory).tree)
      self.shapes = {path: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype)
                     for path, m in metadata.items()}
    if not self._verified:
      if extra != {}:
        self._refuse(f'It is damaged: {digests.FILE} is missing.')
      saved = int(self.read(_STEP)) if _STEP in self.shapes else self.step
      if saved != self.step:
        self._refuse(f'It was saved as step {saved}.')

  def read(self, path: str) -> np.ndarray:
    """A whole leaf in host memory; fastest in the order of `shapes`.

    Raises:
      ConfigError: there is no such leaf.
    """
    if path not in self.shapes:
      raise ConfigError(f'{path}: no such leaf in {self._directory}; see Reader.shapes')
    if path not in self._ahead:
      self._ahead = self._read_from(path)
    return self._ahead.pop(path)

  def _read_from(self, path: str) -> dict[str, np.ndarray]:
    """The leaf at path and those after it, up to _AHEAD bytes.

    Orbax goes through the metadata of all leaves at every call, so single reads would take time
    quadratic in the number of leaves. It also keeps what it has read in reference cycles, which
    Python does not collect for large arrays alone: the whole tree would stay in memory.
    """
    if self._garbage > _GARBAGE:
      gc.collect()
      self._garbage = 0
    chosen, size = {}, 0
    for name in itertools.dropwhile(lambda name: name != path, self.shapes):
      size += math.prod(self.shapes[name].shape) * self.shapes[name].dtype.itemsize
      if chosen and size > _AHEAD:
        break
      chosen[name] = self.shapes[name]
    arrays = trees.flatten(self._read(chosen))
    self._garbage += sum(array.nbytes for array in arrays.values())
    return arrays

  def restore(self, like: Tree) -> Tree:
    """The whole state.

    Args:
      like: nested dict of arrays or ShapeDtypeStructs with the leaves that were saved. Leaves with
        a sharding are restored as jax arrays with it, others as numpy arrays.

    Returns:
      Nested dict like `like`.

    Raises:
      ConfigError: paths, shapes or dtypes differ; lists every difference.
    """
    leaves = trees.flatten(like)
    differences = trees.diff(trees.unflatten(self.shapes), like)
    differences += [f'dtypes differ: {p} {self.shapes[p].dtype} and {leaf.dtype}'
                    for p, leaf in leaves.items()
                    if p in self.shapes and self.shapes[p].dtype != leaf.dtype]
    if differences:
      raise ConfigError(f'the checkpoint {self._directory} (first) does not hold what this run '
                        'needs (second):\n  ' + '\n  '.join(differences))
    arrays = trees.flatten(self._read(leaves))
    return trees.map_with_path(lambda path, _: arrays[path], like)

  def _read(self, leaves: dict[str, Any]) -> Tree:
    """Reads the leaves at these paths and nothing else, each where its sharding places it."""
    item = {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in leaves.items()}
    how = {p: _restore_args(leaf) for p, leaf in leaves.items()}
    args = ocp.args.PyTreeRestore(trees.unflatten(item), restore_args=trees.unflatten(how),
                                  partial_restore=True)
    with self._reading():
      return self._handler.restore(self._directory, args=args)

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Turns errors of the reads within into a ConfigError, where no digests were compared."""
    try:
      yield
    except (MemoryError, PermissionError):
      raise
    except Exception as error:
      if self._verified:
        raise
      cause = error
      while cause.__cause__ is not None:   # Orbax wraps errors
        cause = cause.__cause__
      if not isinstance(cause, Exception) or isinstance(cause, MemoryError):
        raise
      self._refuse(f'It cannot be read ({type(cause).__name__}: {_first_line(cause)}). An earlier '
                   'version of moejax saved it, without digests that would show which file is '
                   'damaged.')

  def _refuse(self, reason: str) -> NoReturn:
    """Raises ConfigError: this step is damaged, or not the one that it is called."""
    step = self._directory.parent
    older = [other for other in finished_steps(step.parent) if other < self.step]
    fail(self._key, str(step), 'a checkpoint whose files are whole',
         f'{reason} Older finished steps there: '
         f'{", ".join(map(str, older)) or "none"}. {self._remedy(older)}')


def set_away(step: int, older: Collection[int], run: str) -> str:
  """Advice for messages: how a run can go on without its damaged step."""
  then = f'resumes from step {max(older)}' if older else 'begins anew'
  return f'renaming it to {step}.damaged: {run} {then}'


def finished_steps(directory: str | os.PathLike) -> list[int]:
  """The finished steps under a checkpoints directory, in order."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  return sorted(int(d.name) for d in directory.iterdir() if d.name.isdigit() and _finished(d))


def _absolute(path: str | os.PathLike) -> epath.Path:
  """path as an absolute path, which Orbax requires; a URL such as gs:// stays as it is.

  Raises ConfigError: Orbax would take a part of the path for a pattern of file names.
  """
  absolute = str(path) if '://' in str(path) else os.path.abspath(path)
  check(not set(absolute) & set(_PATTERN), 'checkpoint', absolute,
        f'a path without the characters {" ".join(_PATTERN)}',
        'Orbax reads them as patterns of file names. Rename the folder.')
  return epath.Path(absolute)


def _first_line(error: BaseException) -> str:
  """The beginning of an error's message."""
  return (str(error).partition(' [tensorstore_spec=')[0].splitlines() or [''])[0][:300].rstrip('.')


def _finished(directory: epath.Path) -> bool:
  """Whether the directory of a step was saved completely."""
  try:
    metadata = json.loads((directory / _COMMIT_FILE).read_text())
  except (OSError, ValueError):
    return False
  if not isinstance(metadata, dict):
    return False
  whole = (directory / digests.FILE).exists() or (   # compared when it is read; or there are none
      (directory / 'state' / '_METADATA').exists() and (directory / 'extra').exists())
  return whole and bool(metadata.get('commit_timestamp_nsecs'))


def _set_unfinished_aside(directory: epath.Path) -> list[str]:
  """Renames unfinished step directories, because of which Orbax would refuse to save their steps.

  Process 0 does it and returns their new names; other processes do nothing.
  """
  if jax.process_index() != 0:
    return []
  renamed = []
  for d in directory.iterdir():
    if d.name.isdigit() and not _finished(d):
      aside = d.parent / f'{d.name}.unfinished'
      if aside.exists():
        aside.rmtree()
      d.rename(aside)
      renamed.append(str(aside))
  return sorted(renamed)


def _savable(path: str, leaf: Any) -> jax.Array | np.ndarray:
  """Returns the leaf. Raises ValueError if a restore would change it or its path."""
  if any('.' in key or not key for key in path.split('/')):
    raise ValueError(f'{path!r}: a checkpoint key must not be empty or hold "."')
  if isinstance(leaf, np.generic):
    return np.asarray(leaf)
  if not isinstance(leaf, np.ndarray | jax.Array):
    raise ValueError(f'{path}: a {type(leaf).__name__} cannot be saved; make it an array')
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise ValueError(f'{path}: save jax.random.key_data(key), not a key')
  return leaf


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  """How Orbax restores a leaf: with the sharding of `leaf`, or as numpy."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray)
  return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
