"""How long a calibration takes here and what memory it needs: counted operations, at rates that are
measured in a second or two.

Counted are the products, of float32 and of the layers, attention, and the loops over codes; not
reading, writing, restoring values or copies.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.backends.numba_cpu.products import add_product
from bloomq.backends.numba_cpu.threads import physical_cores
from bloomq.config import weight_specs
from bloomq.schemes import get_scheme
from bloomq.weights import Matrix

from ..plan import Plan
from .moments import SUMMED_ROWS
from .producer import HEAD_TOKENS, SOLVED_BYTES, Settings
from .solver import SPAN, Calibrated, Solver

_ATTENTION = 3  # of its operations takes as long as so many of a product
_SAMPLE = 1024  # rows and columns of what is measured


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
    sums = layers = weights = 0.0
    for spec in weight_specs(config):
        if not spec.is_matrix or plan.schemes[spec.name].name not in Calibrated:
            continue
        n, k = spec.shape
        weights += n * k
        sums += k**3 / 3 + n * k * k * _products_of_rows(int(facts["sweeps"]))
        if spec.kind == "linear":
            sums += tokens * k * k
            runs = 2 if spec.name.endswith("mlp.up") else 1  # again for the inputs of mlp.down
            layers += 2 * n * k * (runs * tokens + config.head_is_embedding * HEAD_TOKENS)
    attended = tokens + config.head_is_embedding * HEAD_TOKENS
    sums += _ATTENTION * 2 * attended * window * config.hidden_size * config.n_layer
    return sums / rates.products + layers / rates.layers + weights * rates.loops


def _products_of_rows(sweeps: int) -> int:
    """Operations for each weight and column: half a product in GPTQ and for each of two errors, a
    whole one a sweep."""
    return 3 + 2 * sweeps


def peak_bytes(plan: Plan) -> int:
    """Beside Python and its libraries: a moment, its factor (of which half is touched), and rows
    that wait or are solved."""
    config = plan.checkpoint.config
    columns = [spec.shape[1] for spec in weight_specs(config) if spec.kind == "linear"]
    k = max([config.hidden_size, *columns])
    moment, waiting = 4 * k * k, 2 * 4 * k * SUMMED_ROWS
    solving = moment // 2 + 3 * SOLVED_BYTES + plan.workers * 8 * 4 * SPAN * k
    return moment + max(waiting, solving)


def measured_rates(threads: int) -> Rates:
    """By samples, on so many threads, of cores at most."""
    threads = min(threads, physical_cores())
    rng, size = np.random.default_rng(0), _SAMPLE
    x, w = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    with ThreadPoolExecutor(threads) as pool:

        def multiply() -> None:
            sums = [np.zeros((size // 2, size), np.float32) for _ in range(2 * threads)]
            list(pool.map(lambda c: add_product(c, x[:, : size // 2], x), sums))

        products = 2 * threads * size**3 / _best_of(multiply)
        solver = Solver(x.T @ x / np.float32(size), get_scheme("int4", 32), pool)
        rows = np.concatenate([w] * -(-SPAN * threads // size))
        solving = _best_of(lambda: solver.rows(rows))
    work = _products_of_rows(Settings().sweeps) * size / products
    scheme = get_scheme("int8")
    linear = NumbaBackend(threads, "f32").linear(
        Matrix("sample", scheme, (size, size), scheme.quantize(w))
    )
    layers = 2 * size**2 * 256 / _best_of(lambda: linear(x[:256]))
    return Rates(products, layers, max(solving / rows.size - work, 0.0))


def _best_of(run: object, times: int = 4) -> float:
    """Seconds; the first run, which may compile, does not count."""
    assert callable(run)
    found = []
    for _ in range(times):
        started = perf_counter()
        run()
        found.append(perf_counter() - started)
    return max(min(found[1:]), 1e-9)
