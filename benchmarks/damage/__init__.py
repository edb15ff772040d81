"""Ways to break an artifact, each a small function on its files."""

from .encoders import ENCODER_DAMAGE
from .gguf_files import GGUF_DAMAGE
from .graphs import GRAPH_DAMAGE
from .kinds import Damage
from .sides import SIDE_DAMAGE
from .tensors import TENSOR_DAMAGE

DAMAGE: tuple[Damage, ...] = (
    *TENSOR_DAMAGE,
    *SIDE_DAMAGE,
    *GGUF_DAMAGE,
    *GRAPH_DAMAGE,
    *ENCODER_DAMAGE,
)
"""All of them. No two have both artifact and name in common."""

__all__ = ["DAMAGE", "Damage"]
