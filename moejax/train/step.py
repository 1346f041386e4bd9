"""The train step: one pure function of (state, batch), however many devices run it.

Loss terms are ratios of sums over the whole global batch. Their denominators (token counts) do not
depend on parameters, so they are added over devices first; every device and microbatch then takes
the gradient of its numerators over the global denominators, and gradients simply add up.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax import losses, trees
from moejax.moe import balance
from moejax.train import optimizer
from moejax.trees import stacking

KERNEL, BIAS = '/moe/router/kernel', '/moe/router/no_grad/bias'   # ends of paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that a checkpoint holds.

  Attributes:
    step: int32 scalar, the global step: a run that continues another counts on from it.
    params: nested dict of float32.
    opt_state: the paths of params, each leaf replaced by the dict of its optimizer state.
    key: uint32 key data; step n draws its noise from fold_in(key, n).
    window: sums of metrics since they were last logged, nested (see metrics.summarize); {} before
      the first step.
  """
  step: jax.Array
  params: dict
  opt_state: dict
  key: jax.Array
  window: dict

  def as_dict(self) -> dict:
    """Returns the nested dict that a checkpoint holds; `TrainState(**d)` is the inverse."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  def relaid(self, change: Callable[[dict], dict]) -> 'TrainState':
    """Returns the state with parameters and optimizer state in another layout.

    change: {'params': tree, 'opt_state': tree} -> the same two, as the methods of Layout do.
    """
    return dataclasses.replace(self, **change({'params': self.params,
                                               'opt_state': self.opt_state}))


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """What a train step computes.

  Attributes:
    optimizer: how gradients become updates, and which leaves are frozen: those have no part in
      gradients, their norm or their reduction.
    learning_rate: step -> float32.
    task: the training objective, without the auxiliary losses of routers.
    microbatches: parts that a batch is computed in, one after the other; gradients add up.
    examples_per_group: examples that are routed together and must stay in one microbatch.
  """
  optimizer: optimizer.OptimizerConfig
  learning_rate: Callable[[jax.Array], jax.Array]
  task: losses.TaskConfig = losses.PLAIN
  microbatches: int = 1
  examples_per_group: int = 1


def make_train_step(model, settings: StepSettings, reduce: Callable = lambda x: x,
                    outline: bool = False) -> Callable:
  """Returns train_step(state, batch) -> (state, objective of this batch).

  Args:
    model: models.Model.
    settings: what the step computes.
    reduce: adds a tree over devices (psum under pmap); the identity where arrays are global.
    outline: for jax.eval_shape alone, in a fraction of the time: the result has the right shapes,
      but parameters stand for their gradients and nothing is updated.
  """
  def objective(trained, fixed, batch, key, tokens):
    """Returns numerators of this batch over global denominators `tokens`, and all sums."""
    params = trees.unflatten(trained | fixed)
    logits, aux = model.apply(params, batch, train=True, key=key)
    sums = losses.loss_sums(logits, batch, settings.task)
    task_objective = sums.pop('objective') / tokens['loss']
    aux_loss = auxiliary_loss(aux, tokens)
    sums |= {'task_objective': task_objective, 'aux_loss': aux_loss}
    return task_objective + aux_loss, (sums, aux)

  def gradients(params, batch, key, tokens):
    """Returns gradients of the leaves that are trained, and all sums."""
    differentiate = in_outline if outline else functools.partial(jax.value_and_grad, has_aux=True)
    (value, (sums, aux)), grads = differentiate(objective)(*params, batch, key, tokens)
    aux = {path: {k: v for k, v in layer.items() if not k.endswith('_loss')}
           for path, layer in aux.items()}
    sums = {**sums, 'objective': value, 'layers': trees.unflatten(aux)}
    return trees.unflatten(grads), sums

  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, jax.Array]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    tokens = reduce({'loss': batch['weight'].sum(), **model.token_counts(batch)})
    tokens = jax.tree.map(lambda n: jnp.maximum(n.astype(jnp.float32), 1), tokens)
    params = partition(state.params, settings.optimizer)
    grads, sums = reduce(accumulate(lambda part: gradients(params, part, key, tokens), batch,
                                    settings.microbatches, settings.examples_per_group))
    grads, norm = optimizer.clip_by_global_norm(grads, settings.optimizer.clip_norm)
    add_router_norms(sums['layers'], grads)
    flat = trees.flatten(grads)
    grads = trees.map_with_path(   # the optimizer does not read the zeros of frozen leaves
        lambda path, leaf: flat[path] if path in flat else jnp.zeros_like(leaf), state.params)
    new_params, opt_state = (state.params, state.opt_state) if outline else optimizer.update(
        settings.optimizer, grads, state.opt_state, state.params,
        settings.learning_rate(state.step))
    new_params = move_biases(model, settings.optimizer, new_params, sums['layers'])
    sums = {**sums, 'grad_norm': norm, 'steps': jnp.float32(1)}
    window = jax.tree.map(jnp.add, state.window, sums) if state.window else sums
    return TrainState(state.step + 1, new_params, opt_state, state.key, window), sums['objective']

  return train_step


def in_outline(fn: Callable) -> Callable:
  """Returns (first, *rest) -> (fn(first, *rest), first), in place of jax.value_and_grad(fn)."""
  return lambda first, *rest: (fn(first, *rest), first)


def partition(params: dict, config: optimizer.OptimizerConfig) -> tuple[dict, dict]:
  """Splits parameters into those that gradients move and all others, both as {path: leaf}."""
  flat = trees.flatten(params)
  fixed = {path for path in flat if optimizer.untouched(config, path)}
  return ({path: leaf for path, leaf in flat.items() if path not in fixed},
          {path: flat[path] for path in fixed})


def auxiliary_loss(aux: dict, tokens: dict) -> jax.Array:
  """Sums the weighted router losses of a batch: each a mean over tokens, then over its layers.

  Args:
    aux: {'<stack>/layers/<n>': sums of MoELayer}; every name that ends in '_loss' is a loss of its
      own, averaged over the layers that have it.
    tokens: global number of real tokens of each stack.
  """
  total = jnp.float32(0)
  for name in sorted({k for sums in aux.values() for k in sums if k.endswith('_loss')}):
    layers = [sums[name] / tokens[path.split('/')[0]] for path, sums in aux.items() if name in sums]
    total += sum(layers) / len(layers)
  return total


def move_biases(model, config: optimizer.OptimizerConfig, params: dict, layers: dict) -> dict:
  """Moves each router's loss-free bias once (Wang et al. 2024, Algorithm 1).

  The next batch is the first that the new biases route: moved by their own batch's load, they would
  tell tokens of later ones.

  Args:
    model: models.Model; its config has the rates.
    config: a frozen bias keeps its value.
    params: nested dict; leaves '<layer>/moe/router/no_grad/bias' (E,).
    layers: sums of this step over the global batch, nested by layer. 'asked' (E,) is read;
      'router_bias_max', the largest magnitude of the new bias, is added.

  Returns:
    params with new biases.
  """
  def one(path, bias):
    stack, sums = path.split('/')[0], layer_of(layers, path)
    if not optimizer.frozen(config, path):
      bias = balance.update_bias(bias, sums['asked'], model.config.stacks()[stack].moe.bias_rate)
    sums['router_bias_max'] = jnp.abs(bias).max()
    return bias

  def leaf(path, bias):
    if not path.endswith(BIAS):
      return bias
    if not stacking.is_stacked(path):
      return one(path, bias)
    return jnp.stack([one(member, bias[i]) for i, member in enumerate(stacking.members(path))])
  return trees.map_with_path(leaf, params)


def split(batch: dict, parts: int, examples: int) -> dict:
  """Cuts a batch into parts without cutting a routing group or moving examples between devices.

  Consecutive groups go to the parts in turn, so each device's examples fall evenly into all of
  them, and groups are the same for any number of parts.

  Args:
    batch: arrays with a leading axis of examples.
    parts: how many.
    examples: that stay together, such as those of a routing group.

  Returns:
    The arrays with a leading axis of `parts`.
  """
  def cut(x):
    x = x.reshape(-1, parts, examples, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])
  return jax.tree.map(cut, batch)


def join_batches(batches: Sequence[dict], examples: int) -> dict:
  """Joins train batches of one host into one that `split(_, len(batches), examples)` cuts again.

  examples: of a batch on each device, which stay there.
  """
  def joined(*leaves):
    x = np.stack(leaves)
    x = x.reshape(len(leaves), -1, examples, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])
  return jax.tree.map(joined, *batches) if len(batches) > 1 else batches[0]


def scan_steps(train_step: Callable, steps: int, examples: int) -> Callable:
  """Returns (state, joined batches) -> (state after `steps` train steps, the last objective).

  The window of the state must have its entries from the start.

  Args:
    train_step: of `make_train_step`.
    steps: batches that `join_batches` joined.
    examples: as for `join_batches`.
  """
  def run(state: TrainState, batches: dict) -> tuple[TrainState, jax.Array]:
    state, objectives = jax.lax.scan(train_step, state, split(batches, steps, examples))
    return state, objectives[-1]
  return run if steps > 1 else train_step


def accumulate(fn: Callable, batch: dict, parts: int, examples: int):
  """Sums fn(part) over the parts that `split` cuts a batch into, one part in memory at a time."""
  if parts == 1:
    return fn(batch)
  batches = split(batch, parts, examples)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(
      lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None), zeros, batches)[0]


def add_router_norms(layers: dict, grads: dict) -> None:
  """Adds 'router_grad_norm', the L2 norm of each router's clipped gradient, to its layer's sums.

  A frozen router has no gradient in grads, and gets no norm.
  """
  for path, grad in trees.flatten(grads).items():
    if path.endswith(KERNEL):
      squares = jnp.square(grad.astype(jnp.float32)).sum((-2, -1))    # (), or of each block
      for member, total in zip(stacking.members(path), squares.reshape(-1)):
        layer_of(layers, member)['router_grad_norm'] = jnp.sqrt(total)


def layer_of(layers: dict, path: str) -> dict:
  """Returns the sums of the layer that has the leaf at path '<stack>/layers/<n>/moe/...'."""
  for name in path.partition('/moe/')[0].split('/'):
    layers = layers[name]
  return layers
