"""What a served model holds in memory: keys and values of its contexts, and the GPUs for it.

And the memory that a job may hold, as people write it.
"""

from quantkit.capacity.gpus import GPUS, Gpu, find_gpu, find_machine_gpus
from quantkit.capacity.kv_cache import kv_cache_bytes
from quantkit.capacity.memory import read_memory
from quantkit.capacity.shapes import LayerShape, ModelShape, read_shape

__all__ = [
    "GPUS",
    "Gpu",
    "LayerShape",
    "ModelShape",
    "find_gpu",
    "find_machine_gpus",
    "kv_cache_bytes",
    "read_memory",
    "read_shape",
]
