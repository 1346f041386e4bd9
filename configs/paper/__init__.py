"""The real runs of Komatsuzaki et al. (2023), as far as its text and the public code describe them.

Where neither does, the choice is ours, as the file notes. The data, C4, ImageNet (for JFT-300M,
which is not public) and SuperGLUE, must be prepared by TFDS as array_record; data.data_dir names
their folder. SLICES names the TPU slice of each run, for --compile_for=SLICE; on other machines set
--config.mesh.fsdp and --config.mesh.expert.

:runlocal changes more here than in other configs: the model becomes one of mini size, with at most
four experts, and reads data that need no download. Optimizer, losses, kind of routing and surgery
stay: it shows that a config runs from end to end, and nothing about the sizes above.
"""

from ml_collections import ConfigDict

from configs.common import shrink, t5_stacks, words
from moejax.models import t5, vit
from moejax.moe import presets

EXPERTS = 4

# The TPU slice of each pair of runs, dense and upcycled, and the number of chips over which experts
# are placed there. Tokens cross the slice to their experts, and its longest side limits the speed:
# few chips are better, or a slice whose sides are closed to rings.
SLICES = {
    't5_base': 'v5e:4x4', 't5_base_superglue': 'v5e:4x4', 't5_large': 'v5p:4x4x4',
    't5_xl': 'v5p:4x4x8', 'vit_b32': 'v5e:4x4', 'vit_b16': 'v5p:2x2x2', 'vit_l32': 'v5e:4x4',
    'vit_l16': 'v5p:4x4x4'}
EXPERT_AXIS = {
    't5_base': 16, 't5_base_superglue': 16, 't5_large': 32, 't5_xl': 32, 'vit_b32': 16,
    'vit_b16': 8, 'vit_l32': 16, 'vit_l16': 32}
# {(run, experts): microbatches} of upcycled runs whose whole batch would not fit.
MICROBATCHES = {('t5_base', 8): 2, ('t5_base', 32): 2, ('t5_base', 128): 4}

# What the paper varies: words in the argument of an upcycled run, for all its sparse stacks. (The
# paper's routers are presets: 'switch' is top-1, 'vmoe' top-2.)
ABLATIONS = {
    'capacity_1': {'capacity_factor': 1.0, 'eval_capacity_factor': 1.0},
    'capacity_3': {'capacity_factor': 3.0, 'eval_capacity_factor': 3.0},
    'experts_8': {'num_experts': 8}, 'experts_128': {'num_experts': 128},
    'every_layer': {'layers': 'every_1'}}


def vary(moe: ConfigDict, arg: str | None) -> None:
  """Sets the keys of ABLATIONS of the words in a config's argument."""
  for word in words(arg, *presets.BY_NAME, *ABLATIONS):
    moe.update(ABLATIONS.get(word, {}))


def place(config: ConfigDict, name: str, *, experts: int = 0) -> None:
  """Sets scanned blocks and the mesh of the run's slice, where data takes the remaining chips.

  Args:
    config: of the run; changed.
    name: key of SLICES.
    experts: number of a sparse layer; 0: the run is dense.
  """
  config.microbatches = MICROBATCHES.get((name, experts), 1)
  config.execution.update(scan=True, remat='sent' if experts else 'full')
  config.mesh.update(expert=min(EXPERT_AXIS[name], experts) if experts else 1)


def unplace(config: ConfigDict) -> None:
  """Sets a mesh of any devices over the data alone, and whole batches."""
  config.microbatches = 1
  config.mesh.update(data=-1, fsdp=1, expert=1, model=1)


def shrink_t5(config: ConfigDict, source: str, encoder_length: int, decoder_length: int) -> None:
  """Makes a T5 run one of mini size, on bytes of a source that needs no download."""
  shrink(config)
  unplace(config)
  config.model.update(t5.SIZES['mini'])
  config.data.source = source
  config.data.text.vocabulary = 'bytes'
  config.data.text.encoder_length = encoder_length
  config.data.text.decoder_length = decoder_length
  for moe, length in t5_stacks(config):
    moe.num_experts = EXPERTS
    moe.group_size = moe.group_size and length


def shrink_vit(config: ConfigDict) -> None:
  """Makes a ViT run one of mini size, on glyphs of ten characters, probed on digits."""
  shrink(config)
  unplace(config)
  config.model.update(vit.SIZES['mini'])
  config.data.source, config.probe.source = 'glyphs', 'digits'
  config.data.image.update({'size': 24, 'channels': 1, 'classes': 10, 'augment': 'mild'})
  if config.model.moe.layers != 'none':
    config.model.moe.layers = 'last_2'
    config.model.moe.num_experts = EXPERTS
