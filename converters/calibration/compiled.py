"""The inner loops of `gptq` and of `factor`, compiled: 128 rows of the matrix at a time, columns
first.

Innermost loops run over these rows, the lanes, so they vectorise without reordering a sum, and a
row's bits depend on nothing else. They hold no lock: callers give spans of rows to threads.
"""

from __future__ import annotations

import numpy as np

from ..group_scales import cached

_ROUND = np.float32(12582912)  # 1.5 x 2^23: adding and subtracting it rounds, half to even
_SPLIT, _STEP = np.float32(8193), np.float32(0.75)
_LANES = 128  # with 16, checks whether arrays overlap take most of the time
_LEAST_NORMAL = np.float32(6.103515625e-05)  # of float16, 2^-14


@cached
def half(x):  # type: ignore[no-untyped-def]
    """float32 rounded to what float16 holds: Veltkamp's split to 11 bits; below 2^-14 to multiples
    of 2^-24, the last place of 0.75."""
    t = x * _SPLIT
    normal = t - (t - x)
    small = (x + _STEP) - _STEP
    return small if abs(x) < _LEAST_NORMAL else normal


@cached
def nearest(x, lanes, book, numbers):  # type: ignore[no-untyped-def]
    """numbers [lanes] = `Grid.nearest` of x [lanes]; book: see `book_of`. One midpoint
    after another, each for all lanes, which vectorises: or all of solving takes twice as long."""
    low, high = book[0], book[-1]
    if len(book) == 2:
        for lane in range(lanes):
            numbers[lane] = min(max((x[lane] + _ROUND) - _ROUND, low), high)
        return
    for lane in range(lanes):
        numbers[lane] = low
    for i in range(len(book) - 1):
        step = book[i + 1] - book[i]  # whole, so that sums are exact
        middle = book[i] + np.float32(0.5) * step
        for lane in range(lanes):
            numbers[lane] += step if x[lane] > middle else np.float32(0)


@cached
def _largest(w, fed, at, first, lanes, group, up, down):  # type: ignore[no-untyped-def]
    """Of a group's values with what is fed to them: the largest, and the largest of the negated."""
    for lane in range(lanes):
        up[lane] = np.float32(0)
        down[lane] = np.float32(0)
    for k in range(at, at + group):
        for lane in range(lanes):
            v = w[k, first + lane] + fed[k, first + lane]
            up[lane] = max(up[lane], v)
            down[lane] = max(down[lane], -v)


@cached
def _round_group(w, fed, unit, weight, at, first, lanes, book, scale, q, e, work, loss):  # type: ignore[no-untyped-def]
    """Codes q and errors e [group, lanes] of a group with these scales, and its weighed loss."""
    group = q.shape[0]
    inverse, wanted = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for lane in range(lanes):
        inverse[lane] = np.float32(0) if scale[lane] == 0 else np.float32(1) / scale[lane]
        loss[lane] = np.float32(0)
    for k in range(group):
        for lane in range(lanes):
            work[k, lane] = fed[at + k, first + lane]
    for k in range(group):
        for lane in range(lanes):
            wanted[lane] = (w[at + k, first + lane] + work[k, lane]) * inverse[lane]
        nearest(wanted, lanes, book, q[k])
        for lane in range(lanes):
            v, code = w[at + k, first + lane], q[k, lane]
            left = (v + work[k, lane]) - code * scale[lane]
            e[k, lane] = v - code * scale[lane]
            loss[lane] += weight[at + k] * left * left
        for j in range(k + 1, group):
            u = unit[at + k, at + j]
            for lane in range(lanes):
                work[j, lane] += u * e[k, lane]


@cached
def _keep_better(lanes, scale, loss, q, e, best, least, best_q, best_e):  # type: ignore[no-untyped-def]
    better = np.empty(_LANES, np.bool_)
    for lane in range(lanes):
        better[lane] = loss[lane] < least[lane]
        least[lane] = loss[lane] if better[lane] else least[lane]
        best[lane] = scale[lane] if better[lane] else best[lane]
    for k in range(q.shape[0]):
        for lane in range(lanes):
            best_q[k, lane] = q[k, lane] if better[lane] else best_q[k, lane]
            best_e[k, lane] = e[k, lane] if better[lane] else best_e[k, lane]


@cached
def _feed_on(unit, e, at, first, lanes, fed):  # type: ignore[no-untyped-def]
    """Add a group's errors to what is fed to the block's later columns."""
    group = e.shape[0]
    total = np.empty(_LANES, np.float32)
    for j in range(at + group, fed.shape[0]):
        for lane in range(lanes):
            total[lane] = fed[j, first + lane]
        for k in range(group):
            u = unit[at + k, j]
            for lane in range(lanes):
                total[lane] += u * e[k, lane]
        for lane in range(lanes):
            fed[j, first + lane] = total[lane]


@cached
def round_block(  # type: ignore[no-untyped-def]
    begin, end, w, fed, unit, weight, group, shrink, book, given, codes, scales, errors
):  # fmt: skip
    """Rows begin to end of one block of columns: w and fed [columns, N], unit and weight the
    factor's part. Arrays are whole, so that their rows lie side by side and loops vectorise.

    book: see `book_of`; given: [1, N], the scales of rows; of no rows: each group's scale is the
    best of those at which its largest value, of either sign, gets the lowest or the highest number,
    times each of `shrink`.
    """
    q, e = np.empty((group, _LANES), np.float32), np.empty((group, _LANES), np.float32)
    work = np.empty((group, _LANES), np.float32)
    best_q, best_e = np.empty((group, _LANES), np.float32), np.empty((group, _LANES), np.float32)
    up, down = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    scale, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    loss, least = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    low, high = book[0], book[-1]
    for first in range(begin, end, _LANES):
        lanes = min(_LANES, end - first)
        for at in range(0, w.shape[0], group):
            least[:] = np.float32(np.inf)
            best[:] = np.float32(np.inf)  # where nothing fits: a scale that is refused
            best_q[:], best_e[:] = np.float32(0), np.float32(0)
            if len(given):
                best[:lanes] = given[0, first : first + lanes]
                _round_group(
                    w, fed, unit, weight, at, first, lanes, book, best, best_q, best_e, work, loss
                )
            else:
                _largest(w, fed, at, first, lanes, group, up, down)
                for number in range(2 * len(shrink)):
                    s = shrink[number // 2]
                    for lane in range(lanes):
                        above = half(s * max(up[lane] / high, down[lane] / -low))
                        below = -half(s * max(up[lane] / -low, down[lane] / high))
                        scale[lane] = below if number % 2 else above
                    _round_group(
                        w, fed, unit, weight, at, first, lanes, book, scale, q, e, work, loss
                    )
                    _keep_better(lanes, scale, loss, q, e, best, least, best_q, best_e)
            for k in range(group):
                for lane in range(lanes):
                    codes[at + k, first + lane] = np.int8(best_q[k, lane])
                    errors[at + k, first + lane] = best_e[k, lane]
            scales[at // group, first : first + lanes] = best[:lanes]
            _feed_on(unit, best_e, at, first, lanes, fed)


@cached
def _step_scale(h, at, first, lanes, codes, scale, errors, g, step, change):  # type: ignore[no-untyped-def]
    """Set a group's scale to the best for its codes; g is the gradient of the block's columns."""
    group = change.shape[0]
    top, bottom = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    for k in range(group):
        for lane in range(lanes):
            change[k, lane] = np.float32(0)
        for j in range(group):
            for lane in range(lanes):
                change[k, lane] += h[at + k, at + j] * np.float32(codes[at + j, first + lane])
        for lane in range(lanes):
            code = np.float32(codes[at + k, first + lane])
            top[lane] += code * g[at + k, lane]
            bottom[lane] += code * change[k, lane]
    for lane in range(lanes):
        s, d = scale[first + lane], bottom[lane]
        fresh = half(s + top[lane] / d) if d > 0 else s
        step[lane] = fresh - s
        gain = step[lane] * (np.float32(2) * top[lane] - step[lane] * d)
        if not gain > 0 or fresh == 0:  # rounded to half, it may be worse than it was
            step[lane] = np.float32(0)
        scale[first + lane] = s + step[lane]
    for k in range(group):
        for lane in range(lanes):
            change[k, lane] = step[lane] * np.float32(codes[at + k, first + lane])
            errors[at + k, first + lane] -= change[k, lane]
        for j in range(g.shape[0]):
            for lane in range(lanes):
                g[j, lane] -= h[at + k, j] * change[k, lane]


@cached
def _step_code(h, k, first, lanes, book, codes, scale, errors, g, step, wanted, numbers):  # type: ignore[no-untyped-def]
    """Set a column's codes to the best for all else."""
    changed = False
    for lane in range(lanes):
        s = scale[first + lane]
        inverse = np.float32(0) if s == 0 else np.float32(1) / s
        wanted[lane] = np.float32(codes[k, first + lane]) + g[k, lane] / h[k, k] * inverse
    nearest(wanted, lanes, book, numbers)
    for lane in range(lanes):
        code, old = numbers[lane], np.float32(codes[k, first + lane])
        step[lane] = scale[first + lane] * (code - old)
        changed |= code != old
        codes[k, first + lane] = np.int8(code)
        errors[k, first + lane] -= step[lane]
    if changed:
        for j in range(g.shape[0]):
            for lane in range(lanes):
                g[j, lane] -= h[k, j] * step[lane]


@cached
def descend_block(  # type: ignore[no-untyped-def]
    begin, end, gradient, h, group, book, free, codes, scales, errors
):  # fmt: skip
    """Rows begin to end of one block of columns: gradient [columns, N] is h of all columns times
    their errors, h the block's own part. book: see `book_of`; free: the scales may change."""
    g = np.empty((gradient.shape[0], _LANES), np.float32)
    change, step = np.empty((group, _LANES), np.float32), np.empty(_LANES, np.float32)
    wanted, numbers = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(begin, end, _LANES):
        lanes = min(_LANES, end - first)
        for k in range(g.shape[0]):
            for lane in range(lanes):
                g[k, lane] = gradient[k, first + lane]
        for at in range(0, g.shape[0], group):
            scale = scales[at // group]
            if free:
                _step_scale(h, at, first, lanes, codes, scale, errors, g, step, change)
            for k in range(at, at + group):
                _step_code(h, k, first, lanes, book, codes, scale, errors, g, step, wanted, numbers)


@cached
def _triangle(u):  # type: ignore[no-untyped-def]
    """u's upper triangle becomes U; whether it is positive definite."""
    size = u.shape[0]
    for i in range(size):
        if not u[i, i] > 0:
            return False
        root = np.sqrt(u[i, i])
        for j in range(i, size):
            u[i, j] /= root
        for row in range(i + 1, size):
            factor = u[i, row]
            for j in range(row, size):
                u[row, j] -= factor * u[i, j]
    return True


@cached
def corner(part, inverse):  # type: ignore[no-untyped-def]
    """part [B, B]: its upper triangle becomes U, of which U.T @ U was that, and inverse the inverse
    of U; both with zeros below, and float64 within. Whether it is positive definite: nothing is
    changed where it is not."""
    size = part.shape[0]
    u, x = np.triu(part).astype(np.float64), np.eye(size)
    if not _triangle(u):
        return False
    for i in range(size - 1, -1, -1):
        for row in range(i + 1, size):
            factor = u[i, row]
            for j in range(row, size):
                x[i, j] -= factor * x[row, j]
        for j in range(i, size):
            x[i, j] /= u[i, i]
    part[:] = u.astype(np.float32)
    inverse[:] = x.astype(np.float32)
    return True
