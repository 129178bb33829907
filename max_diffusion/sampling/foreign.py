"""Settings of other schedulers that a configuration may hold.

diffusers keeps in a scheduler's configuration what it was given and does not know, so
that a swap to another class and back loses nothing. A name that is neither among these
nor the scheduler's own is a slip, or of a version that this package does not know: it
may change the image.
"""

from __future__ import annotations

from typing import Final

_NAMES: Final = """
    algorithm_type alpha_cum_end alpha_cum_start beta_end beta_max beta_min
    beta_schedule beta_start block_length clip_denoised clip_sample clip_sample_range
    correct_steps corrector_k corrector_order corrector_selection
    corrector_selection_tau corrector_steps disable_corrector dynamic_thresholding_ratio
    editing_threshold entropy_bound eps eta euler_at_final final_sigmas_type
    final_step_size_scale flow_shift gamma gamma_cum_end gamma_cum_start
    interpolation_type lambda_min_clipped lower_order_final mask_token_id
    masking_schedule minimal_topk n_grid noise_mode num_inference_steps
    num_policy_substeps num_vec_classes original_inference_steps predict_x0
    prediction_type predictor_order rescale_betas_zero_snr rho s s_churn s_max s_min
    s_noise sample_max_value sampling_eps scale_factors scaler schedule_mode
    scheduler_type set_alpha_to_one sigma_data sigma_schedule
    skip_prk_steps snr snr_shift_scale solver_order solver_p solver_type stage_range
    stages steps_offset t_lim_ode t_lim_ode_below t_max t_min tail_step_multiplier
    tail_steps tau_func threshold thresholding timestep_scaling timestep_spacing
    timestep_type trained_betas tsr_k tsr_sigma upscale_mode use_lu_lambdas
    variance_type
"""
FOREIGN_SETTINGS: Final = frozenset(_NAMES.split())
"""Names of the settings of all schedulers of diffusers 0.42, but those that the flow
matching one obeys."""
