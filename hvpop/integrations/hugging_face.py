"""A callback for the Trainer of Hugging Face; needs the extra ``hf``."""

from __future__ import annotations

from typing import Any

from ..risk import hugging_face
from ..risk.losses import BatchLoss
from .tracker import Measuring

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "hvpop.integrations.hugging_face needs transformers: pip install 'hvpop[hf]'"
    ) from error


class CurvatureCallback(Measuring, TrainerCallback):  # type: ignore[misc]
    """Largest eigenvalues and trace of the training loss, every so many steps.

    Parameters
    ----------
    every : int
        Optimizer steps between two measurements; the first is after this many.
    data : iterable of batches
        What the loss is averaged over: batches as the model takes them, mappings with labels. A few
        hundred samples tell a curve; the trainer's own loader is never read.
    k : int
        Eigenvalues.
    matrix : {"hessian", "gauss-newton", "fisher"}
        Which matrix.
    params
        Which parameters, as in `HessianOperator`.
    loss : batch loss, optional
        ``loss(model, batch)``, for models that compute none themselves.
    options
        Of `Tracker`: trace, density_every, rtol, max_products, seed.

    Notes
    -----
    Numbers go to the ``log_history`` of the trainer's state. After `attach` they go through
    ``trainer.log``, and so to every tracker that the trainer reports to. Training is the same to the
    last bit. The model is taken as it is at the step, in train mode: dropout masks are fixed by the
    seed. Of several processes the first one measures, on its own copy, while the others wait.

    Examples
    --------
    >>> from hvpop.integrations.hugging_face import CurvatureCallback
    >>> callback = CurvatureCallback(every=100, data=[{"x": 1}])
    >>> callback.every
    100
    """

    def __init__(
        self,
        *,
        every: int,
        data: Any,
        k: int = 1,
        matrix: str = "hessian",
        params: Any = None,
        loss: BatchLoss | None = None,
        **options: Any,
    ) -> None:
        self._begin(every, k, data, matrix, params, loss or hugging_face(), options)
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> CurvatureCallback:
        """Join a trainer, and log through it; returns itself."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        found = self._measured(kwargs["model"], state.global_step)
        if self._trainer is None:
            state.log_history.append({**found, "step": state.global_step})
            return
        due = control.should_log  # of the trainer's own numbers, at this step; log() takes it back
        self._trainer.log(dict(found))
        control.should_log = due
