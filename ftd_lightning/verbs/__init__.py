"""The commands beside Lightning's verbs: what reads, converts and measures artefacts."""
