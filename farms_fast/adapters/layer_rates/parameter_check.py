"""Checks that a model still has the parameters that its groups were made from."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy


class ParameterCheck:
    """Compares the parameters of a plain model with those that it had at the start.

    ValueError at the start for lazy parameters, and for those that are spread over processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = self._now()
        for name, parameter in self._parameters.items():
            if is_lazy(parameter):
                raise ValueError(f"model: {name!r} is not initialised: run the model once first")
            if hasattr(parameter, "placements"):
                raise ValueError(f"model: expected whole parameters, got a sharded one, {name!r}")
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._kinds = self._kinds_now()

    def _now(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _kinds_now(self) -> list[tuple[str, str]]:
        return [(str(p.device), str(p.dtype)) for p in self._parameters.values()]

    def check_unchanged(self) -> None:
        """Raises ValueError if a parameter was added, removed, replaced or reshaped."""
        now, advice = self._now(), "make the rates and the optimizer anew"
        gone = [name for name in self._parameters if name not in now]
        come = [name for name in now if name not in self._parameters]
        if gone or come:
            changes = [f"{gone[0]!r} has gone"] if gone else []
            changes += [f"{come[0]!r} has come"] if come else []
            raise ValueError(
                "model: expected the parameters that it had when its layers were found, but "
                f"{' and '.join(changes)} ({len(gone)} gone, {len(come)} new in all): {advice}"
            )
        for name, parameter in now.items():
            before, shape = self._shapes[name], tuple(parameter.shape)
            if parameter is not self._parameters[name]:
                what = "is another parameter now, which the optimizer does not train"
            elif shape != before:
                what = f"had the shape {before} when its layers were found, now {shape}"
            else:
                continue
            raise ValueError(f"model: {name!r} {what}: {advice}")

    def check_trained(self, optimized: set[int]) -> None:
        """Raises ValueError if a trainable parameter has none of the optimizer's `id`s."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and id(parameter) not in optimized:
                raise ValueError(
                    f"model: {name!r} is trained now, but was frozen when the groups were made "
                    "and is in none of the optimizer's: make the rates and the optimizer anew, or "
                    "add it with add_param_group()"
                )

    def moved(self) -> bool:
        """Whether a device or a dtype has changed since the last call."""
        before, self._kinds = self._kinds, self._kinds_now()
        return before != self._kinds
