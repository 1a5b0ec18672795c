# mypy: allow-untyped-defs, allow-incomplete-defs
"""From raw rewards of grouped candidates to the chosen candidate, in one launch with one program per group.

1. Calibrate: u = (#{z < r} + #{z = r} / 2) / M over the M calibration samples z of the group's prompt: the
   empirical win rate of InfAlign-CTRL, arXiv 2412.19792.
2. Transform each reward by its code, with parameters p0, p1 (p2 is spare):
     IDENTITY r    CALIBRATED u    EXP e^(p0 u)    NEG_EXP -e^(-|p0| u)    LOG log max(u, 1/(2M))
     LOG_SIGMOID -softplus(-(r - p0)), arXiv 2402.00742    CLIP min(max(r, p0), p1)    STANDARDIZE (r - p0) / p1
   EXP and NEG_EXP are InfAlign's transforms for best-of-N and worst-of-N; LOG is best-of-N's own law.
3. Combine with weights: c = sum_r w_r * transformed_r.
4. Select: the first of the largest c, or a sample with probability ~ exp(c / beta) by inverse CDF, which is
   soft best-of-N.
The counts of step 1 are two binary searches, since the samples come sorted: log M loads, not M.
"""

import math
from enum import IntEnum
from typing import Any

import torch

from guiderail.kernels._dispatch import FLOATS, check, fail_if, jit, launch, next_power_of_2, tl, use_triton


class Transform(IntEnum):
    """The codes of step 2. The kernel below repeats the numbers: Triton reads no enums."""

    IDENTITY = 0
    CALIBRATED = 1
    EXP = 2
    NEG_EXP = 3
    LOG = 4
    LOG_SIGMOID = 5
    CLIP = 6
    STANDARDIZE = 7


MAX_EXPONENT = 80.0  # e^80 is still a float32


@jit
def _count_below(samples_ptr, count, value, steps, OR_EQUAL: tl.constexpr):
    """How many of `count` sorted samples lie below (or at) each value, by `steps` halvings."""
    low = tl.zeros_like(value).to(tl.int32)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        sample = tl.load(samples_ptr + middle, mask=open_, other=0.0).to(tl.float32)
        below = sample <= value if OR_EQUAL else sample < value
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@jit(varying=("C", "R", "M", "steps"))
def _reward_pipeline_kernel(
    rewards_ptr,
    reward_g_stride,
    reward_c_stride,
    reward_r_stride,
    counts_ptr,
    samples_ptr,
    sample_counts_ptr,
    codes_ptr,
    params_ptr,
    weights_ptr,
    uniform_ptr,
    choice_ptr,
    combined_ptr,
    transformed_ptr,
    C,
    R,
    M,
    steps,  # of bisection
    beta,
    HAS_SAMPLE_COUNTS: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one group, all its candidates and rewards."""
    g = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    there = c < tl.load(counts_ptr + g)
    total = tl.zeros([BLOCK_C], tl.float32)
    for r in range(R):
        code = tl.load(codes_ptr + r)
        p0 = tl.load(params_ptr + 3 * r)
        p1 = tl.load(params_ptr + 3 * r + 1)
        at = rewards_ptr + g * reward_g_stride + c.to(tl.int64) * reward_c_stride + r * reward_r_stride
        x = tl.load(at, mask=there, other=0.0).to(tl.float32)  # padding may hold anything, NaN too
        y = x
        if (code >= 1) & (code <= 4):
            samples = samples_ptr + (g * R + r) * M
            if HAS_SAMPLE_COUNTS:
                count = tl.load(sample_counts_ptr + g * R + r).to(tl.int32) + tl.zeros([BLOCK_C], tl.int32)
            else:  # padding is +inf, so the valid samples are those below it
                infinite = tl.full([BLOCK_C], float("inf"), tl.float32)
                count = _count_below(samples, M, infinite, steps, False)
            less = _count_below(samples, count, x, steps, False)
            upto = _count_below(samples, count, x, steps, True)
            # less + upto = 2 * less + equal; exact in float32 up to 2^23 samples
            u = (less + upto).to(tl.float32) / (2 * count).to(tl.float32)
            if code == 1:
                y = u
            elif code == 2:
                y = tl.exp(p0 * u)
            elif code == 3:
                y = -tl.exp(-tl.abs(p0) * u)
            else:
                y = tl.log(tl.maximum(u, 1.0 / (2 * count).to(tl.float32)))
        elif code == 5:
            d = x - p0
            e = tl.exp(-tl.abs(d))
            # log1p(e), which Triton lacks: the quotient undoes the rounding of 1 + e. Triton 3.7 makes 1e-38 a float64.
            log1p = tl.where(1.0 + e == 1.0, e, tl.log(1.0 + e) * (e / tl.maximum((1.0 + e) - 1.0, 1.2e-38)))
            y = tl.minimum(d, 0.0) - log1p
        elif code == 6:
            y = tl.minimum(tl.maximum(x, p0), p1)
        elif code == 7:
            y = (x - p0) / p1
        out = transformed_ptr + (g * C + c) * R + r
        tl.store(out, tl.where(there, y, 0.0), mask=c < C)
        total += tl.load(weights_ptr + r) * y
    total = tl.where(there, total, float("-inf"))
    tl.store(combined_ptr + g * C + c, total, mask=c < C)
    best = tl.max(total, axis=0)
    if DRAW:
        mass = tl.where(there, tl.exp((total - best) / beta), 0.0)
        cdf = tl.cumsum(mass, axis=0)
        target = tl.load(uniform_ptr + g) * tl.max(cdf, axis=0)
        choice = tl.min(tl.where((cdf > target) & (mass > 0), c, BLOCK_C), axis=0)
        # A scan's rounding can leave nothing above a target next to the total: then it is the last one.
        last = tl.max(tl.where(mass > 0, c, -1), axis=0)
        choice = tl.where(choice == BLOCK_C, last, choice)
    else:
        choice = tl.min(tl.where(there & (total == best), c, BLOCK_C), axis=0)
        choice = tl.where(choice == BLOCK_C, -1, choice)
    tl.store(choice_ptr + g, choice.to(tl.int64))


def _triton_path(rewards, counts, calibration, cal_counts, codes, params, weights, beta, uniform) -> Any:
    (G, C, R), M, device = rewards.shape, calibration.shape[2], rewards.device
    choice = torch.empty(G, dtype=torch.int64, device=device)
    combined = torch.empty((G, C), dtype=torch.float32, device=device)
    transformed = torch.empty((G, C, R), dtype=torch.float32, device=device)
    launch(
        _reward_pipeline_kernel,
        (G,),
        rewards,
        rewards.stride(0),
        rewards.stride(1),
        rewards.stride(2),
        counts.contiguous(),
        calibration.contiguous(),
        counts if cal_counts is None else cal_counts.contiguous(),  # an absent tensor's pointer is never read
        codes.contiguous(),
        params.contiguous(),
        weights.contiguous(),
        weights if uniform is None else uniform.contiguous(),
        choice,
        combined,
        transformed,
        C,
        R,
        M,
        M.bit_length(),
        float(beta),
        HAS_SAMPLE_COUNTS=cal_counts is not None,
        DRAW=uniform is not None,
        BLOCK_C=next_power_of_2(C),
    )
    return choice, combined, transformed


def _samples(calibration, cal_counts) -> tuple[Any, Any]:
    """The samples in float32 with +inf at all unused places, and how many are used."""
    samples = calibration.float().contiguous()
    if cal_counts is None:
        return samples, (samples < math.inf).sum(2)
    unused = torch.arange(samples.shape[2], device=samples.device) >= cal_counts[:, :, None]
    return samples.masked_fill(unused, math.inf), cal_counts


def _torch_path(rewards, counts, calibration, cal_counts, codes, params, weights, beta, uniform) -> Any:
    there = torch.arange(rewards.shape[1], device=rewards.device) < counts[:, None]
    x = torch.where(there[:, :, None], rewards.float(), 0.0)
    samples, count = _samples(calibration, cal_counts)
    values = x.transpose(1, 2).contiguous()
    less = torch.searchsorted(samples, values).minimum(count[:, :, None])
    upto = torch.searchsorted(samples, values, right=True).minimum(count[:, :, None])
    u = ((less + upto) / (2 * count[:, :, None])).float().transpose(1, 2)
    p0, p1 = params[:, 0], params[:, 1]
    choices = {
        Transform.CALIBRATED: u,
        Transform.EXP: torch.exp(p0 * u),
        Transform.NEG_EXP: -torch.exp(-p0.abs() * u),
        Transform.LOG: torch.log(u.maximum((0.5 / count)[:, None, :])),
        Transform.LOG_SIGMOID: torch.nn.functional.logsigmoid(x - p0),
        Transform.CLIP: x.maximum(p0).minimum(p1),
        Transform.STANDARDIZE: (x - p0) / p1,
    }
    y = x
    for code, transformed in choices.items():
        y = torch.where(codes == code, transformed, y)
    y = torch.where(there[:, :, None], y, 0.0)
    combined = (y * weights).sum(2).masked_fill(~there, -math.inf)
    if uniform is None:
        choice = combined.argmax(1)  # the first of equals
    else:
        mass = torch.softmax(combined / beta, 1)
        cdf = mass.cumsum(1, dtype=torch.float64)
        choice = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1)
    return choice.where(counts > 0, -1), combined, y


def reward_pipeline(
    rewards: Any,
    counts: Any,
    calibration: Any,
    codes: Any,
    params: Any,
    weights: Any,
    *,
    cal_counts: Any = None,
    beta: float = 1.0,
    uniform: Any = None,
    validate: bool = True,
) -> tuple[Any, Any, Any]:
    """Calibrates, transforms, combines and selects, group by group.

    rewards [G, C, R] float16, bfloat16 or float32, any strides; counts [G] int64: candidates of each group in
    [0, C], the rest is padding and is never looked at (it may hold NaN). calibration [G, R, M] of those dtypes,
    ascending along M, unused places at the end +inf, or the valid number given by cal_counts [G, R] int64; M may
    be 0 where no code needs samples. codes [R] int64, see Transform; params [R, 3] and weights [R] float32.
    uniform [G] float32 in [0, 1) draws with probability ~ exp(combined / beta); None takes the first largest.
    validate=False skips the looks at values, which wait for the device once; then a NaN or infinity spreads into
    the results of its group, and the choice there is meaningless.

    Returns (choice [G] int64, -1 for an empty group; combined [G, C] float32, -inf at padding; transformed
    [G, C, R] float32, 0 at padding). Non-finite rewards are the caller's failure to handle: they raise.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device; non-finite rewards at valid
    places; counts or cal_counts out of range; samples that are NaN, -inf, unsorted or missing where a code needs
    them; unknown codes; non-finite weights; unusable params (|p0| > 80 for EXP and NEG_EXP, p0 > p1 for CLIP,
    p1 <= 0 for STANDARDIZE, or non-finite); uniform outside [0, 1); beta not positive and finite.
    """
    check("rewards", rewards, (None, None, None), FLOATS)
    (G, C, R), device = rewards.shape, rewards.device
    check("counts", counts, (G,), (torch.int64,), device)
    check("calibration", calibration, (G, R, None), FLOATS, device)
    check("codes", codes, (R,), (torch.int64,), device)
    check("params", params, (R, 3), (torch.float32,), device)
    check("weights", weights, (R,), (torch.float32,), device)
    if cal_counts is not None:
        check("cal_counts", cal_counts, (G, R), (torch.int64,), device)
    if uniform is not None:
        check("uniform", uniform, (G,), (torch.float32,), device)
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, not {beta}")
    if C == 0 or R == 0:
        raise ValueError("rewards must have room for at least one candidate and one reward")
    if validate and G > 0:
        fail_if(_problems(rewards, counts, calibration, cal_counts, codes, params, weights, uniform))
    if G == 0:
        shapes = ((0, torch.int64), ((0, C), torch.float32), ((0, C, R), torch.float32))
        choice, combined, transformed = (torch.empty(shape, dtype=t, device=device) for shape, t in shapes)
        return choice, combined, transformed
    path = _triton_path if use_triton(rewards) else _torch_path
    done: tuple[Any, Any, Any] = path(rewards, counts, calibration, cal_counts, codes, params, weights, beta, uniform)
    return done


def _problems(rewards, counts, calibration, cal_counts, codes, params, weights, uniform) -> list[tuple[Any, str]]:
    (_, C, _), M, device = rewards.shape, calibration.shape[2], rewards.device
    there = (torch.arange(C, device=device) < counts[:, None])[:, :, None]
    needed = (codes >= Transform.CALIBRATED) & (codes <= Transform.LOG)
    samples, count = _samples(calibration, cal_counts)
    ascending = (samples[:, :, 1:] >= samples[:, :, :-1]).all(2)  # a NaN fails every comparison
    sound = ascending & (samples > -math.inf).all(2) & ((samples < math.inf).sum(2) == count)
    lacking = (count == 0) & (counts > 0)[:, None]
    p0, p1 = params[:, 0], params[:, 1]
    grows = (codes == Transform.EXP) | (codes == Transform.NEG_EXP)
    problems = [
        (((counts < 0) | (counts > C)).any(), f"counts must lie in [0, {C}]"),
        ((there & ~rewards.isfinite()).any(), "rewards must be finite at valid places"),
        (((codes < 0) | (codes > max(Transform))).any(), f"codes must lie in [0, {max(Transform)}]"),
        ((~params.isfinite()).any(), "params must be finite"),
        ((grows & (p0.abs() > MAX_EXPONENT)).any(), f"params: |p0| must be at most {MAX_EXPONENT} for EXP, NEG_EXP"),
        (((codes == Transform.CLIP) & (p0 > p1)).any(), "params: p0 must not exceed p1 for CLIP"),
        (((codes == Transform.STANDARDIZE) & (p1 <= 0)).any(), "params: p1 must be positive for STANDARDIZE"),
        ((~weights.isfinite()).any(), "weights must be finite"),
        ((needed & ~sound).any(), "calibration must be finite and ascending before its padding"),
        ((needed & lacking).any(), "calibration must hold a sample wherever a code needs one"),
    ]
    if cal_counts is not None:
        problems.insert(0, (((cal_counts < 0) | (cal_counts > M)).any(), f"cal_counts must lie in [0, {M}]"))
    if uniform is not None:
        problems.append((~((uniform >= 0) & (uniform < 1)).all(), "uniform must lie in [0, 1)"))
    return problems
