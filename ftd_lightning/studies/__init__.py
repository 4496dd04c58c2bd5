"""Studies made of many fits, each with its measurement, its command, its table and its plot."""
