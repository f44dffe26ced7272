"""Reinforce: add a safe adapter without the part that the user's update needs (Buffer-and-Reinforce, arXiv:2605.24550).

    G = A A^T,  its eigenvectors E of eigenvalues above 0.01 of the largest,   Q = qr(B E)                           (1)
    dW' = scale (dW + dW_safe - alpha Q Q^T dW_safe)                                                                 (2)

In low rank [B | (I - alpha Q Q^T) B_safe] [A; A_safe], exact at rank r + r_safe.

Departs from the official code: scale is 1 as in the formula, where the release has 0.5, which is ``shrink`` at 0.5 on
top; low rank, where the release adds dense float16 weights.
"""

import torch
from pydantic import PositiveFloat

from safebasin.layer import Update
from safebasin.repair import edit
from safebasin.repair.update import Share, project
from safebasin.repair.walk import Layer

FLOOR = 0.01  # of the largest eigenvalue of G: directions below it are none of the user's


@edit("reinforce", paper="arXiv:2605.24550", roles=("safe",), strength=("share", 0.0, 1.0))
class Reinforce:
    """Add a safe adapter beside the user's update."""

    alpha: Share = 0.1  # of the overlap that is taken out of the safe adapter
    scale: PositiveFloat = 1.0  # the release: 0.5
    share: Share = 1.0  # of the safe adapter that is added; ours: the strength

    def edit(self, layer: Layer) -> Update:
        user, safe = layer.tuned, layer.roles["safe"]
        if not self.share:
            return user
        b = user.b
        if user.a is not None:
            values, vectors = torch.linalg.eigh(user.a.double() @ user.a.double().T)
            alive = values > FLOOR * values[-1]
            b = b if alive.all() else (b.double() @ vectors[:, alive]).to(b)
        q = torch.linalg.qr(b)[0]
        part = safe.left(lambda x: x - self.alpha * project(q, x))
        return (user + part * self.share) * self.scale
