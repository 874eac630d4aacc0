"""An orthogonal matrix between the factors of a branch, learned so that rounding loses less.

L R = (L G)(G^T R) for every orthogonal G: the product is the same, its rounding is not. G is found
by turns, as in iterative quantization (Gong, Lazebnik, CVPR 2011; LoRaQ proposes a learned rotation
in the branch, its parametrization is not published):

    R^ <- round(G^T R)          nearest codes of the turned factor
    G  <- argmin ||G^T R - R^|| the orthogonal Procrustes solution, polar(R R^^T)

R alone decides: L is refitted to the rounded R afterwards, whatever G is. The turn of least loss is
returned, no turn at all among them. What it gains at the level of a weight is measured in
`docs/claims.md`: next to nothing, since groups of R run along the input channels,
whose scales already follow each row.
"""

import numpy as np

from loraq_sim.formats import Format
from loraq_sim.quantizers import quantize

__all__ = ["learned_rotation"]

_TURNS = 12


def learned_rotation(right: np.ndarray, fmt: Format) -> np.ndarray:
    """Orthogonal G of shape (r, r), float32, for which round(G^T R) is closest to G^T R.

    Parameters
    ----------
    right : ndarray of shape (r, K), float32
        With the sizes of the components; the left factor orthonormal.
    fmt : Format
        Format the turned factor is rounded to.
    """
    rule = None if fmt.element.is_plain_float else "mse"
    turn = best = np.eye(len(right), dtype=np.float32)
    least = np.inf
    for _ in range(_TURNS):
        turned = turn.T @ right
        rounded = quantize(turned, fmt, rule).dequantize()
        miss = float(np.linalg.norm(turned - rounded))
        if miss < least:
            best, least = turn, miss
        u, _, vt = np.linalg.svd(right @ rounded.T)
        turn = (u @ vt).astype(np.float32)
    return best
