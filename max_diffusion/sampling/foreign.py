"""Settings of a scheduler, and those of others that a configuration may hold.

diffusers keeps in a scheduler's configuration what it was given and does not know, so
that a swap to another class and back loses nothing. A name that is neither among these
nor the scheduler's own is a slip, or of a version that this package does not know: it
may change the image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, get_type_hints

from ..core.json_values import WrongTypeError, typed
from ..errors import ModelLoadError

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


def read_settings(
    kind: type, mapping: Mapping[str, object], foreign: Collection[str] = ()
) -> dict[str, Any]:
    """Reads the fields of a dataclass from a diffusers ``scheduler_config.json``.

    Args:
        kind: The dataclass of the scheduler's own settings.
        mapping: Settings by name; those that ``_use_default_values`` lists count as
            missing. Other names that begin with an underscore are passed over.
        foreign: Names that are passed over beside :data:`FOREIGN_SETTINGS`.

    Returns:
        The settings that the file has, by name.

    Raises:
        ModelLoadError: A name is unknown, or a value has the wrong type.
    """
    kinds = get_type_hints(kind)
    unset = mapping.get("_use_default_values", [])
    is_list = isinstance(unset, list)
    require(is_list, "_use_default_values", "a list of names", unset)
    assert isinstance(unset, list)
    settings = {
        name: value
        for name, value in mapping.items()
        if not name.startswith("_")
        and name not in unset
        and (name in kinds or (name not in FOREIGN_SETTINGS and name not in foreign))
    }
    unknown = sorted(settings.keys() - kinds.keys())
    if unknown:
        raise ModelLoadError(
            f"scheduler: unknown settings {', '.join(unknown)} in "
            "scheduler_config.json; known are " + ", ".join(sorted(kinds)) + "."
        )
    values: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            values[name] = typed(value, kinds[name])
        except WrongTypeError as err:
            require(False, name, err.expected, value)
    return values


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raises :class:`ModelLoadError` for a setting, unless ``holds``."""
    if not holds:
        raise ModelLoadError(
            f"scheduler: {name} must be {expected}, got {got!r}; correct "
            "scheduler_config.json."
        )
