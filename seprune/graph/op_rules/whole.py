"""Operators without a rule, and why the channels that meet them stay whole.

Names stand without the underscore of in-place variants; `*` stands for any letters.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

WHOLE: dict[str, str] = {
    "a recurrent layer mixes its channels with its own state": (
        "_thnn_fused_* _cudnn_rnn* miopen_rnn mkldnn_rnn_layer _lstm_mps quantized_gru "
        "quantized_lstm"
    ),
    "attention sums products of channels, and heads have equal widths": (
        "_scaled_dot_product_* _flash_attention_* _efficient_attention_* _cudnn_attention_* "
        "_triton_* _native_multi_head_attention _transformer_encoder_layer_fwd "
        "_transform_bias_rescale_qkv _masked_softmax _fused_sdp_choice _fill_mem_eff_dropout_mask"
    ),
    "its weight is computed from others, which would have to be cut too": (
        "_weight_norm_interface"
    ),
    "products of channels with channels": (
        "_trilinear addbmm addmv addr dot vdot linalg_cross _cdist_forward _euclidean_dist "
        "_pdist_forward dist trace _compute_linear_combination _addmm_activation"
    ),
    "a matrix decomposition or solution has no channels": (
        "linalg_* _linalg_* cholesky* _cholesky_solve_helper geqrf ormqr lu_unpack triangular_solve"
    ),
    "how many results there are depends on values": (
        "nonzero nonzero_static masked_select masked_scatter unique_* _unique _unique2 nms "
        "bincount histc histogram _histogramdd_* multinomial box_iou_rotated"
    ),
    "places are found by values, among channels too": (
        "take put index_add index_copy index_fill index_reduce searchsorted bucketize isin "
        "_unsafe_masked_index* repeat_interleave segment_reduce _index_put_impl"
    ),
    "positions and channels trade places": (
        "as_strided as_strided_scatter diag_embed diagonal diagonal_scatter block_diag rot90 "
        "_chunk_cat slice_scatter select_scatter slice_inverse"
    ),
    "channels stand for positions of a box": "ps_roi_align ps_roi_pool",
    "its kernel and its offsets have conv groups of their own": "deform_conv2d conv_tbc",
    "bags of rows have no channel dimension of their own": "_embedding_bag* embedding_renorm",
    "a loss: the end of training, not a part of the network": (
        "*_loss _linear_cross_entropy_* *_loss_forward *_loss2d_forward binary_cross_entropy* "
        "_ctc_loss _cudnn_ctc_loss "
        "miopen_ctc_loss _use_*_ctc_loss"
    ),
    "a polynomial or a distribution: nobody has asked for it": (
        "special_*_polynomial_* _standard_gamma* _sample_dirichlet _dirichlet_grad binomial "
        "poisson cauchy geometric log_normal frexp hash_tensor glu_jvp _philox_* "
        "rrelu_with_noise_functional normal_functional"
    ),
    "a new tensor of fixed size, with values that depend on positions": (
        "eye linspace logspace range rand randint randn randperm tril_indices triu_indices "
        "bartlett_window blackman_window hamming_window hann_window kaiser_window fft_fftfreq "
        "fft_rfftfreq affine_grid_generator cudnn_affine_grid_generator from_file empty_permuted "
        "empty_strided new_empty_strided _efficientzerotensor _new_zeros_with_same_feature_meta"
    ),
    "integer arithmetic: prune first, quantize afterwards": (
        "quantize* fake_quantize_* _fake_quantize_* dequantize int_repr q_* qscheme "
        "qnms qroi_align _make_per_* _empty_*_quantized empty_quantized _int_mm _scaled_mm* "
        "_scaled_grouped_mm* _grouped_mm _weight_int* _convert_weight_to_int4pack* _dyn_quant_* "
        "_mixed_dtypes_linear _fused_moving_avg_obs_fq_helper*"
    ),
    "a sparse or nested tensor has no fixed channel dimension": (
        "_sparse_* sparse_* _nested_* _to_sparse* _to_dense to_padded_tensor _coalesce* _indices "
        "indices _values values _nnz _dim? dense_dim is_coalesced ccol_indices crow_indices "
        "col_indices row_indices copy_sparse_to_sparse hspmm _spdiags _spsolve _cslt_* "
        "_convert_indices_* _validate_compressed_* resize_as_sparse _padded_dense_* _jagged_* "
        "_pack_padded_sequence"
    ),
    "it changes storage, not values": (
        "set resize resize_as _resize_output record_stream _copy_from* shallow_copy_data "
        "_lazy_clone _pin_memory is_pinned is_same_size is_set_to _has_same_storage_numel "
        "_local_scalar_dense equal allclose _is_all_true _is_any_true _assert_* _functional_* "
        "_linalg_check_errors _make_dep_token _fw_primal _make_dual"
    ),
    "a kernel below the operators that are recorded": (
        "_conv_depthwise2d _convolution conv_depthwise3d convolution_overrideable "
        "cudnn_convolution* miopen_convolution* miopen_depthwise_convolution mkldnn_* _mkldnn_* "
        "_mps_* slow_conv* _slow_conv2d_forward _nnpack_* to_mkldnn cudnn_grid_sampler "
        "_grid_sampler_2d_cpu_fallback quantized_batch_norm quantized_max_pool* batch_norm_* "
        "_native_batch_norm_legit_functional _batch_norm_with_update_functional _cummax_helper "
        "_cummin_helper _logcumsumexp _aminmax native_norm _stack _masked_scale _fused_dropout "
        "_cudnn_init_dropout_state *_copy"
    ),
    "training only": (
        "*_backward *_backward_* _amp_* _foreach_* _fused_adam* _fused_sgd _fused_adagrad"
    ),
    "a test of torch itself": "_test_* _foobar",
}
"""Why -> the operators of which that is so."""


def why_whole(operator: str) -> str | None:
    """Why there is no rule for an operator; None for one that nobody has looked at."""
    for reason, patterns in WHOLE.items():
        if any(fnmatchcase(operator.rstrip("_"), p) for p in patterns.split()):
            return reason
    return None
