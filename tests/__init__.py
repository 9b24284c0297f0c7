"""Tests of the Python side; the C tests are in tests/c, the golden tests of passes in tests/ir."""
