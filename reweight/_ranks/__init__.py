"""A step on several ranks is one on their joined batch; these modules are for others."""

__all__ = ["collectives", "shards", "wrappers"]
