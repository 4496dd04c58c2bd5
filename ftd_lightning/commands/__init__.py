"""Commands on files: ``ftd info``, ``ftd export``, ``ftd import``, ``ftd configs``."""
