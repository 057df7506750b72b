"""A callback for the Trainer of Lightning; needs the extra ``lightning``."""

from __future__ import annotations

from typing import Any

from ..risk import autoencoder, hugging_face, supervised
from ..risk.losses import BatchLoss, Loss
from .tracker import Measuring

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "hvpop.integrations.lightning needs lightning: pip install 'hvpop[lightning]'"
    ) from error


class CurvatureCallback(Measuring, Callback):
    """Largest eigenvalues and trace of a loss, every so many steps, logged with ``log_dict``.

    Parameters
    ----------
    every : int
        Optimizer steps between two measurements; the first is after this many.
    data : iterable of batches
        What the loss is averaged over; the trainer's own loader is never read.
    loss : callable
        ``loss(outputs, targets)``, where the module's ``forward`` gives the outputs; or a batch loss
        of `hvpop.risk`. A ``training_step`` is not called, for what it logs.
    k : int
        Eigenvalues.
    matrix : {"hessian", "gauss-newton", "fisher"}
        Which matrix.
    params
        Which parameters, as in `HessianOperator`.
    options
        Of `Tracker`: trace, density_every, rtol, max_products, seed.

    Notes
    -----
    Training is the same to the last bit. Of several processes the first one measures, on its own
    copy, while the others wait.

    Examples
    --------
    >>> import torch
    >>> from hvpop.integrations.lightning import CurvatureCallback
    >>> callback = CurvatureCallback(every=100, data=[], loss=torch.nn.MSELoss())
    >>> callback.every
    100
    """

    def __init__(
        self,
        *,
        every: int,
        data: Any,
        loss: Loss | BatchLoss,
        k: int = 1,
        matrix: str = "hessian",
        params: Any = None,
        **options: Any,
    ) -> None:
        own = isinstance(loss, supervised | autoencoder | hugging_face)
        batch_loss: Any = loss if own else supervised(loss)  # type: ignore[arg-type]
        self._begin(every, k, data, matrix, params, batch_loss, options)
        self._last = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Measure, if it is time; gradients may be accumulated over several batches of a step."""
        step = trainer.global_step
        if step == self._last or step % self.every:
            return
        self._last = step
        if trainer.is_global_zero:
            found = self._measured(pl_module, step)
            pl_module.log_dict(found, rank_zero_only=True)
