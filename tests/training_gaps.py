"""What training cannot do yet: the tests state the behaviour wanted and must fail until then.

A row is `file::test` with its reason. A test that starts to pass fails the suite (strict), so that its row is deleted.
Tests that take the process down are not run.
"""

from __future__ import annotations

RUNS_IN_EAGER = "the call runs in eager"
NO_GRADIENT = "WRONG: an output or a leaf silently gets no gradient"
WRONG = "WRONG: silently another gradient than eager"
SECOND = "WRONG: a second derivative is silently missing or another than eager's"
CRASHES = "the process dies"

TRAINING_GAPS = {
    "test_coverage_models.py::test_model_trains_like_eager[bert]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[clip]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[gpt2]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[llama]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[llama_cache]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[mistral]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[mixtral]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[modernbert]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[swin]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[t5]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[wav2vec2]": RUNS_IN_EAGER,
    "test_coverage_models.py::test_model_trains_like_eager[whisper]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradcheck[cumprod]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradcheck[nn.functional.scaled_dot_product_attention]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradcheck[pow]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradcheck[prod]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradcheck[where]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[__getitem__]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[cat]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[masked_fill]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[nn.functional.dropout]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[nn.functional.scaled_dot_product_attention]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[pow]": RUNS_IN_EAGER,
    "test_coverage_ops.py::test_gradients_of_frequent_operator_equal_eager[where]": RUNS_IN_EAGER,
    "test_examples.py::test_minilm_training_follows_eager_without_fallback": RUNS_IN_EAGER,
    "test_train_hooks.py::test_autograd_function_of_which_one_input_needs_grad": RUNS_IN_EAGER,
    "test_train_hooks.py::test_autograd_function_that_marks_its_input_dirty": RUNS_IN_EAGER,
    "test_train_hooks.py::test_autograd_function_without_materialized_gradients": RUNS_IN_EAGER,
    "test_train_hooks.py::test_hook_on_an_intermediate_inside": RUNS_IN_EAGER,
    "test_train_hooks.py::test_module_backward_hooks": RUNS_IN_EAGER,
    "test_train_hooks.py::test_module_backward_pre_hooks": RUNS_IN_EAGER,
    "test_train_hooks.py::test_retain_grad_on_an_intermediate_that_is_returned": RUNS_IN_EAGER,
    "test_train_modules.py::test_module_trains_like_eager[embedding_bag]": RUNS_IN_EAGER,
    "test_train_modules.py::test_module_trains_like_eager[instance_norm]": RUNS_IN_EAGER,
    "test_train_modules.py::test_module_trains_like_eager[triplet]": RUNS_IN_EAGER,
    "test_train_random.py::test_dropout_at_its_ends[1.0]": RUNS_IN_EAGER,
    "test_train_random.py::test_dropout_in_place": RUNS_IN_EAGER,
    "test_train_semantics.py::test_leaf_is_mutated_under_no_grad": RUNS_IN_EAGER,
    "test_train_values.py::test_complex[dtype0]": RUNS_IN_EAGER,
    "test_train_values.py::test_complex[dtype1]": RUNS_IN_EAGER,
    "test_train_values.py::test_delicate_derivative[clamp_at_the_bounds]": RUNS_IN_EAGER,
    "test_train_values.py::test_delicate_derivative[cumprod_with_a_zero]": RUNS_IN_EAGER,
    "test_train_values.py::test_delicate_derivative[embedding_bag]": RUNS_IN_EAGER,
    "test_train_values.py::test_delicate_derivative[prod_with_a_zero]": RUNS_IN_EAGER,
    "test_train_values.py::test_delicate_derivative[where]": RUNS_IN_EAGER,
    "test_train_values.py::test_real_to_complex_and_back": RUNS_IN_EAGER,
    "test_jit_grad.py::test_enable_grad_inside_with_a_parameter_runs_eager_or_right": NO_GRADIENT,
    "test_train_modes.py::test_no_grad_around_with_enable_grad_inside": NO_GRADIENT,
    "test_train_random.py::test_reparameterized_sampling_of_a_distribution": WRONG,
    "test_train_semantics.py::test_in_place_on_intermediates": WRONG,
    "test_train_grad_api.py::test_once_differentiable_raises_in_the_second_backward_as_in_eager": SECOND,
}
