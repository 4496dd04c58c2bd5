"""Commands that read and convert stores and sets: ``ftd info``, ``ftd export``, ``ftd import``."""
