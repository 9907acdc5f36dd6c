"""The Triton kernel of :mod:`seodang.student.triton_kd`; only that module imports this one.

The formulae are those of :mod:`seodang.student.losses` and :mod:`seodang.student.divergences`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def log_over_mean(x):
    """-log((1 + exp(x)) / 2), by a series where rounding would eat it."""
    far = 0.6931471805599453 - tl.maximum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    y = tl.where(tl.abs(x) < 0.05, x, 0.0)
    near = -y * (0.5 + y * (0.125 - y * y * (1.0 / 192)))
    return tl.where(tl.abs(x) < 0.05, near, far)


@triton.jit
def loss_and_gradient(
    logits_ptr,
    offsets_ptr,
    ids_ptr,
    weights_ptr,
    scratch_ptr,
    targets_ptr,
    values_ptr,
    v,
    scale,
    ce_weight,
    KIND: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The loss of one row, and its gradient in place of the row's logits."""
    PARTITION: tl.constexpr = KIND != "cross-entropy"
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * v
    first = tl.load(offsets_ptr + row)
    last = tl.load(offsets_ptr + row + 1)
    lanes = tl.arange(0, BLOCK_E)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        counted = target >= 0
        target_logit = tl.load(logits_ptr + target, mask=counted, other=0.0).to(tl.float32)

    # The stored ids' logits are put aside; in a partition they leave the row, so that the
    # rest is summed and not subtracted.
    stored_max = -float("inf")
    mass = tl.full((), 0.0, tl.float64)  # of which 1 is subtracted
    for start in range(first, last, BLOCK_E):
        there = start + lanes < last
        ids = tl.load(ids_ptr + start + lanes, mask=there, other=0)
        logit = tl.load(logits_ptr + ids, mask=there, other=-float("inf")).to(tl.float32)
        tl.store(scratch_ptr + start + lanes, logit, mask=there)
        stored_max = tl.maximum(stored_max, tl.max(logit, 0))
        weights = tl.load(weights_ptr + start + lanes, mask=there, other=0.0)
        mass += tl.sum(weights.to(tl.float64), 0)
    tl.debug_barrier()
    if PARTITION:
        for start in range(first, last, BLOCK_E):
            there = start + lanes < last
            ids = tl.load(ids_ptr + start + lanes, mask=there, other=0)
            tl.store(logits_ptr + ids, -float("inf"), mask=there)
        tl.debug_barrier()

    # -1e30 rather than -inf, whose difference from itself is no number
    highest = tl.full((BLOCK_V,), -1e30, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, v, BLOCK_V):
        others_logit = tl.load(
            logits_ptr + start + columns, mask=start + columns < v, other=-float("inf")
        ).to(tl.float32)
        higher = tl.maximum(highest, others_logit)
        sums = sums * tl.exp(highest - higher) + tl.exp(others_logit - higher)
        highest = higher
    top = tl.max(highest, 0)
    others = tl.sum(sums * tl.exp(highest - top), 0)
    lse = top + tl.log(others)
    log_rest = 0.0
    if PARTITION:
        base = tl.maximum(top, stored_max)
        total = others * tl.exp(top - base)
        for start in range(first, last, BLOCK_E):
            there = start + lanes < last
            logit = tl.load(scratch_ptr + start + lanes, mask=there, other=-float("inf"))
            total += tl.sum(tl.exp(logit - base), 0)
        log_rest = lse
        lse = base + tl.log(total)
        log_rest = tl.where(others > 0, log_rest - lse, -float("inf"))

    # The value, a of each entry, their sum t, and b / r: see one_pass.
    value = 0.0
    t = 0.0
    for start in range(first, last, BLOCK_E):
        there = start + lanes < last
        log_q = tl.load(scratch_ptr + start + lanes, mask=there, other=0.0) - lse
        w = tl.load(weights_ptr + start + lanes, mask=there, other=0.0)
        x = tl.log(tl.maximum(w, 1.1754943508222875e-38)) - log_q
        if KIND == "reverse-kl":
            a = -tl.exp(log_q) * x
            loss = a
        elif KIND == "jsd":
            a = 0.5 * tl.exp(log_q) * log_over_mean(x)
            loss = a + 0.5 * w * log_over_mean(-x)
        else:
            a = -w
            loss = -w * log_q
        value += tl.sum(tl.where(there, loss, 0.0), 0)
        t += tl.sum(tl.where(there, a, 0.0), 0)
    off = 0.0
    if PARTITION:
        rest = (1.0 - mass).to(tl.float32)  # of the teacher
        has_rest = log_rest > -float("inf")
        log_r = tl.where(has_rest, log_rest, -87.0)
        if KIND == "residual":
            rest = tl.where(has_rest & (rest > 1e-6), rest, 0.0)
            value -= rest * log_r
            t -= rest
            off = -rest * tl.exp(-log_r)
        else:
            rest = tl.maximum(rest, 1e-6)
            rest_x = tl.where(has_rest, tl.log(rest) - log_r, 0.0)
            r = tl.where(has_rest, tl.exp(log_r), 0.0)
            if KIND == "reverse-kl":
                value += -r * rest_x
                t += -r * rest_x
                off = -rest_x
            else:
                half = 0.5 * log_over_mean(rest_x)
                value += r * half + tl.where(has_rest, 0.5 * rest * log_over_mean(-rest_x), 0.0)
                t += r * half
                off = half
    tl.store(values_ptr + row * 2, value)
    if HAS_TARGETS:
        tl.store(values_ptr + row * 2 + 1, tl.where(counted, lse - target_logit, 0.0))
        t -= tl.where(counted, ce_weight, 0.0)

    if KEEP:
        off = (off - t) * scale
        for start in range(0, v, BLOCK_V):
            inside = start + columns < v
            others_logit = tl.load(logits_ptr + start + columns, mask=inside, other=0.0)
            others_grad = tl.exp(others_logit.to(tl.float32) - lse) * off
            tl.store(logits_ptr + start + columns, others_grad, mask=inside)
        tl.debug_barrier()
        if HAS_TARGETS:  # before the entries, which overwrite it with theirs if it is stored
            target_grad = tl.exp(target_logit - lse) * off - ce_weight * scale
            tl.store(logits_ptr + target, target_grad, mask=counted)
            tl.debug_barrier()
        for start in range(first, last, BLOCK_E):
            there = start + lanes < last
            ids = tl.load(ids_ptr + start + lanes, mask=there, other=-1)
            log_q = tl.load(scratch_ptr + start + lanes, mask=there, other=0.0) - lse
            w = tl.load(weights_ptr + start + lanes, mask=there, other=0.0)
            if KIND == "cross-entropy":
                # Entries of the same id add up, and each then writes the same.
                a = tl.zeros((BLOCK_E,), tl.float32)
                for other in range(first, last):
                    other_id = tl.load(ids_ptr + other)
                    a -= tl.where(ids == other_id, tl.load(weights_ptr + other), 0.0)
            elif KIND == "residual":
                a = -w
            else:
                x = tl.log(tl.maximum(w, 1.1754943508222875e-38)) - log_q
                if KIND == "reverse-kl":
                    a = -tl.exp(log_q) * x
                else:
                    a = 0.5 * tl.exp(log_q) * log_over_mean(x)
            if HAS_TARGETS:
                a -= tl.where(counted & (ids == target), ce_weight, 0.0)
            grad = (a - tl.exp(log_q) * t) * scale
            tl.store(logits_ptr + ids, grad, mask=there)
