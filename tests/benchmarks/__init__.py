"""Speed and memory of this library beside plain loops: ``make bench``. No part of the tests."""
