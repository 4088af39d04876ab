"""Models in folders and on the Hugging Face hub: `model.safetensors` beside timm's `config.json`.

`save.py` writes a folder, `arguments.py` finds the arguments that rebuild a model, `load.py` reads
a folder or a repository of the hub, `source.py` fetches the files of either.
"""

from .arguments import describe
from .load import from_pretrained
from .save import save_pretrained

__all__ = ["describe", "from_pretrained", "save_pretrained"]
