"""ViT-L/32 on ImageNet-1k, 49 tokens an image: vit_b16.py in another size."""

from configs.paper import vit_b16


def get_config(arg=None):
  return vit_b16.get_config(arg, size='L/32')
