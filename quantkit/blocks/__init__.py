"""One input group solved: fold a scale out of its input, round its weights, say how well it went.

A fold divides the input of a group by a scale per channel and multiplies the columns of its
weights by it. In the artifact the division sits in the operation in front (a norm, or the rows of
a linear layer). The walk keeps that operation as it was, since the forwards that wait in front of
the group have run it already, and divides the columns of the dequantized weight instead: the
same function, up to rounding.
"""

from quantkit.blocks.draft import Draft, finish_block, replay_input_group
from quantkit.blocks.encoding import encode_input_group, replay_encoded_group
from quantkit.blocks.kv import solve_kv_cache
from quantkit.blocks.solving import solve_input_group

__all__ = [
    "Draft",
    "encode_input_group",
    "finish_block",
    "replay_encoded_group",
    "replay_input_group",
    "solve_input_group",
    "solve_kv_cache",
]
