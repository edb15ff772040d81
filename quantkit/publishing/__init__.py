"""Outputs that passed, on the Hub: checked again, sent in one commit, named for those who serve."""

from quantkit.publishing.promoting import promote
from quantkit.publishing.run import publish

__all__ = ["promote", "publish"]
