"""Many recipes and models in one call: each job a process of its own, one after the other or side
by side, on this machine or on a cluster of Ray.

The package imports nothing: `quantkit.sweeping.jobs` refuses what it can without torch.
"""
