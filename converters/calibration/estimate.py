"""How long a calibration takes here and what memory it needs: counted operations, at rates that are
measured in a second or two.

Counted are the products, of float32 and of the layers, attention, and the loops over codes; not
reading, writing, restoring values or copies.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bloomq.config import WeightSpec, weight_specs
from bloomq.scheme_choice import DEFAULT_SCHEME
from bloomq.schemes import get_scheme
from bloomq.weights import Matrix

from ..plan import Plan
from .cpu_engine import SOLVED_BYTES
from .engine import Device, Engine
from .forward import STEP_TOKENS
from .moments import SUMMED_ROWS
from .producer import HEAD_TOKENS, Settings, making_up
from .rounding import SPAN
from .solver import Calibrated, Solver

_ATTENTION = 3  # of its operations takes as long as so many of a product
_SAMPLE = 1024  # columns of what is measured
_DEVICE_ROWS = 8192  # of a sample there: a launch takes as long for any number
# torch's context and its libraries; and of a layer: biases of attention, a restored matrix.
_CONTEXT_BYTES, _LAYER_BYTES = 600 << 20, (256 + 128) << 20
_WIDE_ACTIVATIONS = 4  # [tokens, 4C] at once: of a product, of gelu, and of what is summed


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations a second of float32 products and of a layer's products; seconds a weight of the
    loops over codes."""

    products: float
    layers: float
    loops: float


def seconds_of(plan: Plan, rates: Rates) -> float:
    """Of a calibrated conversion, at these rates."""
    config, facts = plan.checkpoint.config, plan.options["calibration"]
    tokens, window = int(facts["tokens"]), int(facts["window"])
    regressed = _regressed(plan)
    sums = layers = weights = 0.0
    for spec in _solved(plan):
        n, k = spec.shape
        weights += n * k
        sums += k**3 / 3 + n * k * k * _products_of_rows(int(facts["sweeps"]))
        if spec.kind == "linear":
            sums += tokens * k * k
            runs = 2 if spec.name.endswith("mlp.up") else 1  # again for the inputs of mlp.down
            runs += bool(regressed)  # the checkpoint's own
            layers += 2 * n * k * (runs * tokens + config.head_is_embedding * HEAD_TOKENS)
        if spec.name in regressed:  # what it should add times its inputs; solved by elimination
            sums += 2 * tokens * n * k + 2 * k**3 / 3 + 2 * n * k * k
    attended = (1 + bool(regressed)) * tokens + config.head_is_embedding * HEAD_TOKENS
    sums += _ATTENTION * 2 * attended * window * config.hidden_size * config.n_layer
    return sums / rates.products + layers / rates.layers + weights * rates.loops


def _solved(plan: Plan) -> list[WeightSpec]:
    return [
        spec for spec in weight_specs(plan.checkpoint.config)
        if spec.is_matrix and plan.schemes[spec.name].name in Calibrated
    ]  # fmt: skip


def _regressed(plan: Plan) -> frozenset[str]:
    facts = plan.options["calibration"]
    asked = Settings(correct_bias=facts["correct_bias"], make_up=facts["make_up"])
    return making_up(plan.checkpoint.config, plan.schemes, asked, int(facts["tokens"]))


def _products_of_rows(sweeps: int) -> int:
    """Operations for each weight and column: half a product in GPTQ and for each of two errors, a
    whole one a sweep."""
    return 3 + 2 * sweeps


def peak_bytes(plan: Plan) -> int:
    """Beside Python and its libraries. On the CPU a moment, and rows that wait, or its factor (of
    which half is touched) and rows that are solved, or a regression's: the moment damped, as it is
    factored, and three arrays like the matrix. With another device, of what is solved there the
    rows alone, and those that a regression gave."""
    most, regressed, solving = 0, _regressed(plan), 3 * SOLVED_BYTES
    for spec in weight_specs(plan.checkpoint.config):
        if not spec.is_matrix:
            continue
        n, k = spec.shape
        if plan.device is not None:
            given = 4 * n * k if spec.name in regressed else 0
            most = max(most, 4 * 4 * k * _rows_at_once(n, k) + given)
            continue
        moment, waiting = 4 * k * k, 2 * 4 * k * SUMMED_ROWS
        rows = moment // 2 + solving + plan.workers * 8 * 4 * SPAN * k
        regression = 2 * moment + 3 * 4 * n * k if spec.name in regressed else 0
        most = max(most, moment + max(waiting, rows, regression))
    return most


def device_bytes(plan: Plan) -> int:
    """Of the memory of torch's device: the most that a matrix needs, a moment in turns with its
    factor (three arrays at once) and with the rows that are solved (six), or a regression's; and
    the layers of a block."""
    config, regressed, most = plan.checkpoint.config, _regressed(plan), 0
    for spec in _solved(plan):
        n, k = spec.shape
        moment, rows = 4 * k * k, 4 * k * _rows_at_once(n, k)
        regression = 3 * moment + 3 * 4 * n * k if spec.name in regressed else 0
        most = max(most, 3 * moment, 2 * moment + 6 * rows, regression)
    block = 12 * config.hidden_size**2  # of int8, the checkpoint's own; the stored are gone then
    window = max(STEP_TOKENS, int(plan.options["calibration"]["window"]))
    wide = _WIDE_ACTIVATIONS * 4 * window * 4 * config.hidden_size
    return most + block + wide + _LAYER_BYTES + _CONTEXT_BYTES


def _rows_at_once(n: int, k: int) -> int:
    from .torch_engine import solved_rows

    return min(n, solved_rows(k))


def measured_rates(plan: Plan) -> Rates:
    """By samples, on the plan's device and threads. Raises: CapacityError."""
    with ThreadPoolExecutor(plan.workers) as pool:
        engine = Device(plan.device).engine(pool, plan.workers)
        with engine.watched():
            return _measured(engine, plan.workers)


def _measured(engine: Engine, threads: int) -> Rates:
    rng, size = np.random.default_rng(0), _SAMPLE
    x, w = (rng.standard_normal((2 * size, size), np.float32) for _ in range(2))
    wide = np.hstack([x, w])

    def multiply() -> None:
        moments = engine.moments()
        moments.add(engine.there(wide))
        moments.result(central=False)

    products = wide.size * wide.shape[1] / _best_of(multiply)
    # As many rows as are solved at a time: on the CPU by each thread, on a device by all of it.
    count = SPAN * threads if engine.at_once else _DEVICE_ROWS
    rows = np.concatenate([w] * -(-count // len(w)))
    solver = Solver(x.T @ x / np.float32(len(x)), get_scheme(DEFAULT_SCHEME), engine)
    solving = _best_of(lambda: solver.rows(rows))
    work = _products_of_rows(Settings().sweeps) * size / products
    scheme = get_scheme("int8")
    matrix = Matrix("sample", scheme, (size, size), scheme.quantize(w[:size]))
    linear, tokens = engine.layers.linear(matrix), x[: engine.at_once]
    layers = 2 * size * tokens.size / _best_of(lambda: engine.layers.numpy(linear(tokens)))
    return Rates(products, layers, max(solving / rows.size - work, 0.0))


def _best_of(run: Callable[[], object], times: int = 4) -> float:
    """Seconds; the first run, which may compile, does not count."""
    found = []
    for _ in range(times):
        started = perf_counter()
        run()
        found.append(perf_counter() - started)
    return max(min(found[1:]), 1e-9)
