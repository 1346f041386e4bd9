"""The real runs of Komatsuzaki et al. (2023), as far as its text and the public code tell them.

Where neither does, the choice is ours and the file says so. The data, C4, ImageNet (for JFT-300M,
which is not public) and SuperGLUE, must be prepared by TFDS as array_record; data.data_dir names
their folder. A mesh with more than one kind of axis is the command line's: --config.mesh.expert=8.

:runlocal changes more here than in other configs: the model becomes one of mini size, with at most
four experts, and reads embedded data. Optimizer, losses, kind of routing and surgery stay: it shows
that a config runs from end to end, and nothing about the sizes above.
"""

from ml_collections import ConfigDict

from configs import shrink
from moejax.models import t5, vit

EXPERTS = 4


def shrink_t5(config: ConfigDict, source: str, encoder_length: int, decoder_length: int) -> None:
  """The same kind of T5 run in mini size, on bytes of an embedded source."""
  shrink(config)
  config.model.update(t5.SIZES['mini'])
  config.data.source = source
  config.data.text.vocabulary = 'bytes'
  config.data.text.encoder_length = encoder_length
  config.data.text.decoder_length = decoder_length
  for moe, length in stacks(config):
    moe.num_experts = EXPERTS
    moe.group_size = moe.group_size and length


def shrink_vit(config: ConfigDict) -> None:
  """The same kind of ViT run in mini size, on glyphs of ten characters, probed on digits."""
  shrink(config)
  config.model.update(vit.SIZES['mini'])
  config.data.source, config.probe.source = 'glyphs', 'digits'
  config.data.image.update({'size': 24, 'channels': 1, 'classes': 10, 'augment': 'mild'})
  if config.model.moe.layers != 'none':
    config.model.moe.layers = 'last_2'
    config.model.moe.num_experts = EXPERTS


def stacks(config: ConfigDict) -> list[tuple[ConfigDict, int]]:
  """(MoE settings, tokens of an example) of a T5's encoder and decoder."""
  return [(config.model.encoder_moe, config.data.text.encoder_length),
          (config.model.decoder_moe, config.data.text.decoder_length)]
