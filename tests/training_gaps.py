"""What training cannot do yet: the tests state the behaviour wanted and must fail until then.

A row is `file::test` with its reason. A test that starts to pass fails the suite (strict), so that its row is deleted.
Tests that take the process down are not run.
"""

from __future__ import annotations

RUNS_IN_EAGER = "the call runs in eager"
CRASHES = "the process dies"

TRAINING_GAPS = {
    "test_train_hooks.py::test_autograd_function_that_marks_its_input_dirty": RUNS_IN_EAGER,
    "test_train_semantics.py::test_leaf_is_mutated_under_no_grad": RUNS_IN_EAGER,
}
