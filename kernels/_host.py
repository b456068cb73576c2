"""The host library on numpy arrays: outputs first, everything checked before the library is called.

A "T array" has one dtype T of float32, float16 or bfloat16. numpy has no bfloat16: pass arrays of
`ml_dtypes.bfloat16`, or their uint16 bits together with `dtype="bfloat16"`. Arrays must be
C-contiguous; `[N, ...]` stands for any shape with N first, whose remaining product is M.
"""

import ctypes
from collections.abc import Callable

import numpy as np

from blockcache.kernels._arrays import (
    Array,
    FloatArray,
    SeedArray,
    address,
    dtype_name,
    require,
    samples_and_elements,
)
from blockcache.kernels._library import (
    DTYPES,
    LAYOUTS,
    ROW,
    GuidedSolverStepArgs,
    KernelError,
    ScaleShiftResidualArgs,
    check,
    host_library,
)

_ERROR_STEP = -5  # BC_ERROR_STEP
_WRITTEN = ("next_sample", "x0_out", "next_input")


def bind_guided_solver_step(
    next_sample: FloatArray,
    *,
    sample: FloatArray,
    model_out: Array | None,
    table: FloatArray,
    x0_out: FloatArray | None = None,
    next_input: Array | None = None,
    previous_x0: FloatArray | None = None,
    earlier_x0: FloatArray | None = None,
    guidance: FloatArray | float | None = None,
    image_guidance: FloatArray | float | None = None,
    rescale: FloatArray | None = None,
    seeds: SeedArray | None = None,
    dtype: str | None = None,
) -> Callable[[int], None]:
    """Checks the arguments of `guided_solver_step` once and returns it as a function of the step.

    The arrays are kept alive and read at every call, so their contents may change in between:
    new guidance or another table of the same shape need no new binding.

    Args:
        next_sample: float32 [N, ...], written; may be `sample`.
        sample: float32 [N, ...].
        model_out: T [2N, ...] with guidance, the unconditional half first; [3N, ...] with image
            guidance too, what is conditioned on the image alone in the middle; else [N, ...]. None
            where no step that will be run reads it.
        table: float32 [S, 8], rows (c_sample, c_model, c_previous, c_earlier, d_sample, d_model,
            next_input_scale, c_noise).
        x0_out: float32 [N, ...], written with d_sample * sample + d_model * guided output; may
            be `previous_x0` or `earlier_x0`.
        next_input: T, shaped as `model_out`, written with next_input_scale * next_sample.
        previous_x0: float32 [N, ...]; None where its coefficient is 0.
        earlier_x0: float32 [N, ...]; None where its coefficient is 0.
        guidance: the guidance scale, one or float32 [N]; None: no guidance.
        image_guidance: InstructPix2Pix's second scale, one or float32 [N], beside the first; None:
            two halves.
        rescale: float32 [N] of `guidance_rescale_factors`.
        seeds: uint64 [N], one a sample; None where no step adds noise.
        dtype: T by name, where the arrays do not tell.

    Returns:
        A function of the step in 0..S-1. It raises KernelError for a step outside, and where the
        step's row needs an array that is None.

    Raises:
        KernelError: an array has the wrong dtype, shape or memory order, or an output overlaps
            another array in a way that is not allowed.
    """
    floats = {
        "next_sample": next_sample,
        "x0_out": x0_out,
        "sample": sample,
        "previous_x0": previous_x0,
        "earlier_x0": earlier_x0,
    }
    scales = None if guidance is None else _per_sample(guidance, next_sample.shape[:1])
    images = None if image_guidance is None else _per_sample(image_guidance, next_sample.shape[:1])
    if images is not None and scales is None:
        raise KernelError("image_guidance: expected guidance beside it, got none")
    uniform = {
        "table": table,
        "guidance": scales,
        "image_guidance": images,
        "rescale": rescale,
        "seeds": seeds,
    }
    return _bind(floats, uniform, {"model_out": model_out, "next_input": next_input}, dtype)


def _bind(
    floats: dict[str, Array | None],
    uniform: dict[str, Array | None],
    typed: dict[str, Array | None],
    dtype: str | None,
) -> Callable[[int], None]:
    """Binds the arguments of `bind_guided_solver_step`, grouped by the shape they must have."""
    next_sample, table = _present(floats, "next_sample"), _present(uniform, "table")
    shape = next_sample.shape
    N, M = samples_and_elements("next_sample", next_sample)
    S = table.shape[0] if table.ndim else 0
    for name, array in floats.items():
        require(name, array, shape, "float32", write=name in _WRITTEN)
    for name, array in uniform.items():
        T = "uint64" if name == "seeds" else "float32"
        require(name, array, (S, ROW) if name == "table" else (N,), T)
    T = "float32"
    parts = 1 + sum(uniform[name] is not None for name in ("guidance", "image_guidance"))
    batched = (parts * N, *shape[1:])
    for name, array in typed.items():
        if array is not None:
            T = dtype_name(name, array, dtype)
    for name, array in typed.items():
        require(name, array, batched, T, dtype, write=name in _WRITTEN)

    arrays = {**floats, **uniform, **typed}
    args = GuidedSolverStepArgs(N=N, M=M, S=S, dtype=DTYPES[T])
    for name, array in arrays.items():
        setattr(args, name, address(array))
    library = host_library()
    call = library.bc_host_guided_solver_step
    pointer = ctypes.byref(args)  # keeps `args` alive

    def run(step: int, _keep_alive: object = arrays) -> None:
        code = call(pointer, step)
        if code:
            check(library, "guided_solver_step", code)

    # The library looks at the step last: refusing it means that the rest is in order.
    code = call(pointer, -1)
    if code != _ERROR_STEP:
        check(library, "guided_solver_step", code)
    return run


def guided_solver_step(
    next_sample: FloatArray,
    *,
    sample: FloatArray,
    model_out: Array | None,
    table: FloatArray,
    step: int,
    x0_out: FloatArray | None = None,
    next_input: Array | None = None,
    previous_x0: FloatArray | None = None,
    earlier_x0: FloatArray | None = None,
    guidance: FloatArray | float | None = None,
    image_guidance: FloatArray | float | None = None,
    rescale: FloatArray | None = None,
    seeds: SeedArray | None = None,
    dtype: str | None = None,
) -> None:
    """Guidance, solver update, x0 and next model input in one pass over memory.

    With u and c the halves of `model_out` and g = rescale * (u + guidance * (c - u)), or with u, i
    and c its thirds g = rescale * (u + image_guidance * (i - u) + guidance * (c - i)), or
    g = model_out without guidance: next_sample = c_sample * sample + c_model * g
    + c_previous * previous_x0 + c_earlier * earlier_x0 + c_noise * z, in float32 and in that order,
    z being standard normal noise of each sample's seed and the step. Arrays whose coefficients are
    0 are not read. A loop should bind once: see `bind_guided_solver_step`, which also describes the
    arguments.

    Args:
        next_sample: see `bind_guided_solver_step`, as all but `step`.
        sample: see there.
        model_out: see there.
        table: see there.
        step: row of the table, 0..S-1.
        x0_out: see there.
        next_input: see there.
        previous_x0: see there.
        earlier_x0: see there.
        guidance: see there.
        image_guidance: see there.
        rescale: see there.
        seeds: see there.
        dtype: see there.

    Raises:
        KernelError: as there, and for a step outside the table.
    """
    run = bind_guided_solver_step(
        next_sample,
        sample=sample,
        model_out=model_out,
        table=table,
        x0_out=x0_out,
        next_input=next_input,
        previous_x0=previous_x0,
        earlier_x0=earlier_x0,
        guidance=guidance,
        image_guidance=image_guidance,
        rescale=rescale,
        seeds=seeds,
        dtype=dtype,
    )
    run(step)


def bind_guidance_rescale_factors(
    factors: FloatArray,
    *,
    model_out: Array,
    guidance: FloatArray | float,
    phi: FloatArray | float,
    dtype: str | None = None,
) -> Callable[[], None]:
    """Checks the arguments of `guidance_rescale_factors` once and returns it as a function.

    The arrays are kept alive and read at every call.

    Args:
        factors: float32 [N], written.
        model_out: T [2N, ...], the unconditional half first.
        guidance: the guidance scale, one or float32 [N].
        phi: how far to rescale, one or float32 [N]: 0 not at all, 1 to the conditional output's
            spread.
        dtype: T by name, where the array does not tell.

    Raises:
        KernelError: an array has the wrong dtype, shape or memory order.
    """
    rows, M = samples_and_elements("model_out", model_out)
    N = rows // 2
    if rows != 2 * N:
        raise KernelError(
            f"model_out: expected 2N samples, both halves of the guidance, got {rows}"
        )
    T = dtype_name("model_out", model_out, dtype)
    scales, phis = _per_sample(guidance, (N,)), _per_sample(phi, (N,))
    require("factors", factors, (N,), "float32", write=True)
    require("model_out", model_out, model_out.shape, T, dtype)
    require("guidance", scales, (N,), "float32")
    require("phi", phis, (N,), "float32")
    library = host_library()
    call = library.bc_host_guidance_rescale_factors
    arrays = (factors, model_out, scales, phis)
    arguments = (*map(address, arrays), N, M, DTYPES[T])

    def run(_keep_alive: object = arrays) -> None:
        code = call(*arguments)
        if code:
            check(library, "guidance_rescale_factors", code)

    return run


def guidance_rescale_factors(
    model_out: Array,
    *,
    guidance: FloatArray | float,
    phi: FloatArray | float,
    dtype: str | None = None,
) -> FloatArray:
    """Per sample phi * std(c) / std(g) + 1 - phi: the `rescale` of `guided_solver_step`.

    For the arguments see `bind_guidance_rescale_factors`.

    Returns:
        float32 [N].

    Raises:
        KernelError: an array has the wrong dtype, shape or memory order.
    """
    rows, _ = samples_and_elements("model_out", model_out)
    factors = np.empty(rows // 2, np.float32)
    bind_guidance_rescale_factors(
        factors, model_out=model_out, guidance=guidance, phi=phi, dtype=dtype
    )()
    return factors


def relative_change(
    now: Array, before: Array, *, images: int | None = None, dtype: str | None = None
) -> tuple[FloatArray, float]:
    """Eq. 6: sum |now - before| / sum |now|, in one pass over both.

    The order of summation is fixed; the result is within 9 units of 2^-24 of the exact quotient.

    Args:
        now: T [N, ...].
        before: T, shaped as `now`.
        images: sample n belongs to image n % images, so that both halves of an image's guidance
            count as one; None: every sample is an image of its own.
        dtype: T by name, where the arrays do not tell.

    Returns:
        float32 [images], one change per image, and the change over all images together. No
        difference is 0, also where all is 0.

    Raises:
        KernelError: an array has the wrong dtype, shape or memory order, or `images` does not
            divide N.
    """
    N, M = samples_and_elements("now", now)
    count = N if images is None else images
    if count < 1 or N % count:
        raise KernelError(f"images: expected a number that divides {N} samples, got {images}")
    T = dtype_name("now", now, dtype)
    require("now", now, now.shape, T, dtype)
    require("before", before, now.shape, T, dtype)
    per_image = np.empty(count, np.float32)
    whole = np.empty(1, np.float32)
    library = host_library()
    addresses = (address(per_image), address(whole), address(now), address(before))
    code = library.bc_host_relative_change(*addresses, count, N, M, DTYPES[T])
    check(library, "relative_change", code)
    return per_image, float(whole[0])


def scale_shift_residual(
    y: Array,
    *,
    x: Array,
    last: Array,
    scale: FloatArray,
    shift: FloatArray,
    before: Array | None = None,
    before_scale: FloatArray | None = None,
    layout: str = "nchw",
    dtype: str | None = None,
) -> None:
    """Y = x + scale * last + before_scale * before + shift, per channel, rounded to T once.

    Args:
        y: T [N, C, ...] ("nchw") or [N, ..., C] ("nhwc"), written; may be `x`, `last` or `before`.
        x: T, shaped as `y`.
        last: T, shaped as `y`: the block's last output.
        scale: float32 [C].
        shift: float32 [C].
        before: T, shaped as `y`: the output before the last; None: no second term.
        before_scale: float32 [C], needed with `before`.
        layout: "nchw" or "nhwc".
        dtype: T by name, where the arrays do not tell.

    Raises:
        KernelError: an array has the wrong dtype, shape or memory order, or `y` overlaps another
            array without being it.
    """
    if layout not in LAYOUTS:
        raise KernelError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    N, M = samples_and_elements("y", y)
    if y.ndim < 2:
        raise KernelError(f"y: expected an array of at least 2 axes, got shape {y.shape}")
    C = y.shape[1] if layout == "nchw" else y.shape[-1]
    T = dtype_name("y", y, dtype)
    require("y", y, y.shape, T, dtype, write=True)
    for name, array in {"x": x, "last": last, "before": before}.items():
        require(name, array, y.shape, T, dtype)
    for name, row in {"scale": scale, "shift": shift, "before_scale": before_scale}.items():
        require(name, row, (C,), "float32")
    args = ScaleShiftResidualArgs(N=N, C=C, L=M // C, layout=LAYOUTS[layout], dtype=DTYPES[T])
    args.y, args.x, args.last, args.before = map(address, (y, x, last, before))
    args.scale, args.shift, args.before_scale = map(address, (scale, shift, before_scale))
    library = host_library()
    check(library, "scale_shift_residual", library.bc_host_scale_shift_residual(args))


def _present(arrays: dict[str, Array | None], name: str) -> Array:
    array = arrays[name]
    if array is None:
        raise KernelError(f"{name}: expected an array, got None")
    return array


def _per_sample(value: FloatArray | float, shape: tuple[int, ...]) -> FloatArray:
    """One number for all samples as float32 [N], `shape` being (N,)."""
    return np.full(shape, value, np.float32) if isinstance(value, float | int) else value
