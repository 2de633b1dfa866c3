"""The inner loops of `solver`, compiled: 16 rows of the matrix at a time, columns first."""

from __future__ import annotations

import numpy as np

from ..quantize import _cached

_ROUND = np.float32(12582912)  # 1.5 x 2^23: adding and subtracting it rounds, half to even
_SPLIT, _STEP = np.float32(8193), np.float32(0.75)


@_cached
def half(x):  # type: ignore[no-untyped-def]
    """float32 rounded to what float16 holds, by Veltkamp's split; below 2^-14 to steps of 2^-24."""
    t = x * _SPLIT
    normal = t - (t - x)
    small = (x + _STEP) - _STEP
    return small if abs(x) < np.float32(6.103515625e-05) else normal


@_cached
def round_block(w, fed, unit, weight, group, shrink, low, high, given, codes, scales, errors):  # type: ignore[no-untyped-def]
    columns, rows = w.shape
    values = np.empty((group, 16), np.float32)
    q = np.empty((group, 16), np.float32)
    e = np.empty((group, 16), np.float32)
    best_q = np.empty((group, 16), np.float32)
    best_e = np.empty((group, 16), np.float32)
    work, feed = np.empty((group, 16), np.float32), np.empty((group, 16), np.float32)
    up, down = np.empty(16, np.float32), np.empty(16, np.float32)
    scale, inverse = np.empty(16, np.float32), np.empty(16, np.float32)
    loss, best_loss, best = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    tries = 2 * len(shrink) if len(given) == 0 else 1
    for first in range(0, rows, 16):
        for at in range(0, columns, group):
            for lane in range(16):
                up[lane] = np.float32(0)
                down[lane] = np.float32(0)
                best_loss[lane] = np.float32(np.inf)
                best[lane] = np.float32(0)
            for k in range(group):
                for lane in range(16):
                    values[k, lane] = w[at + k, first + lane]
                    feed[k, lane] = fed[at + k, first + lane]
                    v = values[k, lane] + feed[k, lane]
                    up[lane] = max(up[lane], v)
                    down[lane] = max(down[lane], -v)
                    best_e[k, lane] = values[k, lane]
                    best_q[k, lane] = np.float32(0)
            for number in range(tries):
                for lane in range(16):
                    if len(given) > 0:
                        s = given[0, first + lane]
                    elif number < len(shrink):
                        s = half(shrink[number] * max(up[lane] / high, down[lane] / -low))
                    else:
                        s = -half(shrink[number - len(shrink)] * max(up[lane] / -low, down[lane] / high))
                    scale[lane] = s
                    inverse[lane] = np.float32(0) if s == 0 else np.float32(1) / s
                    loss[lane] = np.float32(0)
                for k in range(group):
                    for lane in range(16):
                        work[k, lane] = feed[k, lane]
                for k in range(group):
                    for lane in range(16):
                        v = values[k, lane] + work[k, lane]
                        c = (v * inverse[lane] + _ROUND) - _ROUND
                        c = min(max(c, low), high)
                        r = v - c * scale[lane]
                        q[k, lane] = c
                        e[k, lane] = values[k, lane] - c * scale[lane]
                        loss[lane] += weight[at + k] * r * r
                    for j in range(k + 1, group):
                        u = unit[at + k, at + j]
                        for lane in range(16):
                            work[j, lane] += u * e[k, lane]
                for lane in range(16):
                    better = loss[lane] < best_loss[lane]
                    best_loss[lane] = loss[lane] if better else best_loss[lane]
                    best[lane] = scale[lane] if better else best[lane]
                    loss[lane] = np.float32(1) if better else np.float32(0)
                for k in range(group):
                    for lane in range(16):
                        take = loss[lane] > 0
                        best_q[k, lane] = q[k, lane] if take else best_q[k, lane]
                        best_e[k, lane] = e[k, lane] if take else best_e[k, lane]
            for lane in range(16):
                scales[at // group, first + lane] = best[lane]
            for k in range(group):
                for lane in range(16):
                    codes[at + k, first + lane] = np.int8(best_q[k, lane])
                    errors[at + k, first + lane] = best_e[k, lane]
            for j in range(at + group, columns):
                for lane in range(16):
                    values[0, lane] = fed[j, first + lane]
                for k in range(group):
                    u = unit[at + k, j]
                    for lane in range(16):
                        values[0, lane] += u * best_e[k, lane]
                for lane in range(16):
                    fed[j, first + lane] = values[0, lane]


@_cached
def descend_block(gradient, h, group, low, high, free, codes, scales, errors):  # type: ignore[no-untyped-def]
    columns, rows = gradient.shape
    g = np.empty((columns, 16), np.float32)
    change = np.empty((group, 16), np.float32)
    top, bottom, step = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    for first in range(0, rows, 16):
        for k in range(columns):
            for lane in range(16):
                g[k, lane] = gradient[k, first + lane]
        for at in range(0, columns, group):
            if free:
                for lane in range(16):
                    top[lane] = np.float32(0)
                    bottom[lane] = np.float32(0)
                for k in range(group):
                    for lane in range(16):
                        change[k, lane] = np.float32(0)
                    for j in range(group):
                        for lane in range(16):
                            change[k, lane] += h[at + k, at + j] * np.float32(codes[at + j, first + lane])
                    for lane in range(16):
                        c = np.float32(codes[at + k, first + lane])
                        top[lane] += c * g[at + k, lane]
                        bottom[lane] += c * change[k, lane]
                for lane in range(16):
                    s = scales[at // group, first + lane]
                    d = bottom[lane]
                    fresh = half(s + top[lane] / d) if d > 0 else s
                    step[lane] = fresh - s
                    gain = step[lane] * (np.float32(2) * top[lane] - step[lane] * d)
                    if not (gain > 0) or fresh == 0:
                        step[lane] = np.float32(0)
                    scales[at // group, first + lane] = s + step[lane]
                for k in range(group):
                    for lane in range(16):
                        change[k, lane] = step[lane] * np.float32(codes[at + k, first + lane])
                        errors[at + k, first + lane] -= change[k, lane]
                    for j in range(columns):
                        for lane in range(16):
                            g[j, lane] -= h[at + k, j] * change[k, lane]
            for k in range(group):
                any_change = False
                for lane in range(16):
                    s = scales[at // group, first + lane]
                    old = np.float32(codes[at + k, first + lane])
                    inverse = np.float32(0) if s == 0 else np.float32(1) / s
                    c = old + g[at + k, lane] / h[at + k, at + k] * inverse
                    c = (c + _ROUND) - _ROUND
                    c = min(max(c, low), high)
                    step[lane] = s * (c - old)
                    any_change |= c != old
                    codes[at + k, first + lane] = np.int8(c)
                    errors[at + k, first + lane] -= step[lane]
                if any_change:
                    for j in range(columns):
                        for lane in range(16):
                            g[j, lane] -= h[at + k, j] * step[lane]
