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
    opt_state: params' paths, each leaf replaced by its optimizer slots.
    key: uint32 key data; step n draws its noise from fold_in(key, n).
    window: sums of metrics since they were last logged, nested (see metrics.summarize); {} stands
      for none yet.
  """
  step: jax.Array
  params: dict
  opt_state: dict
  key: jax.Array
  window: dict

  def as_dict(self) -> dict:
    """Nested dict for a checkpoint; `TrainState(**d)` is the inverse."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def make_train_step(model, optimizer_config: optimizer.OptimizerConfig, learning_rate: Callable, *,
                    task: losses.TaskConfig = losses.PLAIN, microbatches: int = 1,
                    examples_per_group: int = 1, reduce: Callable = lambda x: x,
                    outline: bool = False) -> Callable:
  """Builds train_step(state, batch) -> (state, objective of this batch).

  Args:
    model: models.Model.
    optimizer_config: how gradients become updates, and which leaves are frozen: those have no part
      in gradients, their norm or their reduction.
    learning_rate: step -> float32.
    task: what is trained on, beside the auxiliary losses of routers.
    microbatches: the batch is worked through in this many parts, gradients added up.
    examples_per_group: examples that are routed together and must stay in one microbatch.
    reduce: adds a tree over devices (psum under pmap); the identity where arrays are global.
    outline: for jax.eval_shape alone, in a fraction of the time: the result has the right shapes,
      but parameters stand for their gradients and nothing is updated.
  """
  def objective(trained, fixed, batch, key, tokens):
    """Numerators of this batch over global denominators `tokens`; and all sums."""
    params = trees.unflatten(trained | fixed)
    logits, aux = model.apply(params, batch, train=True, key=key)
    sums = losses.loss_sums(logits, batch, task)
    task_objective = sums.pop('objective') / tokens['loss']
    aux_loss = auxiliary_loss(aux, tokens)
    sums |= {'task_objective': task_objective, 'aux_loss': aux_loss}
    return task_objective + aux_loss, (sums, aux)

  def gradients(params, batch, key, tokens):
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
    params = partition(state.params, optimizer_config)
    parts = split(batch, microbatches, examples_per_group)
    total = (gradients(params, parts[0], key, tokens) if microbatches == 1 else
             accumulate(lambda part: gradients(params, part, key, tokens), parts))
    grads, sums = reduce(total)
    grads, norm = optimizer.clip_by_global_norm(grads, optimizer_config.clip_norm)
    add_router_norms(sums['layers'], grads)
    flat = trees.flatten(grads)
    grads = trees.map_with_path(   # zeros that the optimizer does not read stand for the others
        lambda path, leaf: flat[path] if path in flat else jnp.zeros_like(leaf), state.params)
    new_params, opt_state = (state.params, state.opt_state) if outline else optimizer.update(
        optimizer_config, grads, state.opt_state, state.params, learning_rate(state.step))
    new_params = move_biases(model, optimizer_config, new_params, sums['layers'])
    sums = {**sums, 'grad_norm': norm, 'steps': jnp.float32(1)}
    window = jax.tree.map(jnp.add, state.window, sums) if state.window else sums
    return TrainState(state.step + 1, new_params, opt_state, state.key, window), sums['objective']

  return train_step


def in_outline(fn: Callable) -> Callable:
  """In place of jax.value_and_grad: the first argument stands for its gradient."""
  return lambda first, *rest: (fn(first, *rest), first)


def partition(params: dict, config: optimizer.OptimizerConfig) -> tuple[dict, dict]:
  """Parameters that gradients move and all others, both as {path: leaf}."""
  flat = trees.flatten(params)
  fixed = {path for path in flat if optimizer.untouched(config, path)}
  return ({path: leaf for path, leaf in flat.items() if path not in fixed},
          {path: flat[path] for path in fixed})


def auxiliary_loss(aux: dict, tokens: dict) -> jax.Array:
  """Weighted router losses of a batch: means over real tokens, then over the layers that have it.

  Args:
    aux: {'<stack>/layers/<n>': sums of MoELayer}; every name ending in '_loss' counts, each by
      itself.
    tokens: global number of real tokens of each stack.
  """
  total = jnp.float32(0)
  for name in sorted({k for sums in aux.values() for k in sums if k.endswith('_loss')}):
    layers = [sums[name] / tokens[path.split('/')[0]] for path, sums in aux.items() if name in sums]
    total += sum(layers) / len(layers)
  return total


def move_biases(model, config: optimizer.OptimizerConfig, params: dict, layers: dict) -> dict:
  """Loss-free balancing (Wang et al. 2024, Algorithm 1): each router's bias, moved once.

  The next batch is the first that the new biases route: moved by their own batch's load, they would
  let tokens know of later ones.

  Args:
    model: models.Model; its config has the rates.
    config: a frozen bias stays.
    params: nested dict; leaves '<layer>/moe/router/no_grad/bias' (E,).
    layers: sums of this step over the global batch, nested by layer; 'asked' (E,) is read, and
      'router_bias_max', the largest magnitude of the new bias, is put in.

  Returns:
    params with new biases.
  """
  stacks = model.config.stacks()

  def one(path, bias):
    stack, node = path.split('/')[0], layer_of(layers, path)
    if not optimizer.frozen(config, path):
      bias = balance.update_bias(bias, node['asked'], stacks[stack].moe.bias_rate)
    node['router_bias_max'] = jnp.abs(bias).max()
    return bias

  def leaf(path, bias):
    if not path.endswith(BIAS):
      return bias
    if not stacking.is_stacked(path):
      return one(path, bias)
    return jnp.stack([one(member, bias[i]) for i, member in enumerate(stacking.members(path))])
  return trees.map_with_path(leaf, params)


def split(batch: dict, parts: int, examples_per_group: int) -> list[dict] | dict:
  """Cuts a batch into microbatches without cutting a routing group or moving rows between devices.

  Consecutive groups go to the microbatches in turn, so each device's rows fall evenly into all of
  them, and groups are the same whatever `parts` is.

  Returns:
    [batch] for one part, else a dict of arrays with a leading axis of `parts`.
  """
  if parts == 1:
    return [batch]
  def cut(x):
    x = x.reshape(-1, parts, examples_per_group, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])
  return jax.tree.map(cut, batch)


def join(batches: Sequence[dict], rows: int) -> dict:
  """Train batches of one host -> a batch that `split(_, len(batches), rows)` cuts into them again.

  rows: of a batch on each device, which stay there.
  """
  def joined(*leaves):
    x = np.stack(leaves)
    return x.reshape(len(leaves), -1, rows, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(joined, *batches) if len(batches) > 1 else batches[0]


def dispatch(train_step: Callable, steps: int, rows: int) -> Callable:
  """(state, `join`ed batches) -> (state after `steps` of train_step, the last objective).

  The state's window has its entries from the start. rows: as for join.
  """
  def run(state: TrainState, batches: dict) -> tuple[TrainState, jax.Array]:
    state, objectives = jax.lax.scan(train_step, state, split(batches, steps, rows))
    return state, objectives[-1]
  return run if steps > 1 else train_step


def accumulate(fn: Callable, parts: dict):
  """Sum of fn(part) over the leading axis of parts, one part in memory at a time."""
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(
      lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None), zeros, parts)[0]


def add_router_norms(layers: dict, grads: dict) -> None:
  """Puts the L2 norm of each router's gradient, after clipping, into its layer's sums.

  A frozen router has no gradient in grads, and gets no norm.
  """
  for path, grad in trees.flatten(grads).items():
    if path.endswith(KERNEL):
      squares = jnp.square(grad.astype(jnp.float32)).sum((-2, -1))    # (), or of each block
      for member, total in zip(stacking.members(path), squares.reshape(-1)):
        layer_of(layers, member)['router_grad_norm'] = jnp.sqrt(total)


def layer_of(layers: dict, path: str) -> dict:
  """The sums of the layer that a leaf '<stack>/layers/<n>/moe/...' is of, in nested ones."""
  for name in path.partition('/moe/')[0].split('/'):
    layers = layers[name]
  return layers
