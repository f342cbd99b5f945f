"""Whether a model is still the one whose parameters were shared out."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["ModelWatch"]


class ModelWatch:
    """The parameters of a model as they were when it was made.

    Args:
        model: the plain module.

    Raises:
        ValueError: a parameter is not initialised, as those of lazy modules before their first
            run, or spread over processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = self._now()
        lazy = next((name for name, p in self._parameters.items() if is_lazy(p)), None)
        if lazy is not None:
            raise ValueError(f"model: {lazy!r} is not initialised: run the model once first")
        sharded = next((n for n, p in self._parameters.items() if hasattr(p, "placements")), None)
        if sharded is not None:
            raise ValueError(f"model: expected whole parameters, got a sharded one, {sharded!r}")
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._places = self._placed()

    def _now(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _placed(self) -> list[tuple[str, str]]:
        return [(str(p.device), str(p.dtype)) for p in self._parameters.values()]

    def check(self) -> None:
        """Raises ValueError if a parameter has gone, come, been replaced, reshaped or unfrozen."""
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
            shape = tuple(parameter.shape)
            if parameter is not self._parameters[name]:
                what = "is another parameter now, which the optimizer does not train"
            elif shape != self._shapes[name]:
                what = f"had the shape {self._shapes[name]} when its layers were found, now {shape}"
            else:
                continue
            raise ValueError(f"model: {name!r} {what}: {advice}")

    def check_trained(self, optimized: set[int]) -> None:
        """Raises ValueError if a parameter is trained, but not by the optimizer.

        Args:
            optimized: the `id` of every parameter that the optimizer has.
        """
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and id(parameter) not in optimized:
                raise ValueError(
                    f"model: {name!r} is trained now, but was frozen when the groups were made "
                    "and is in none of the optimizer's: make the rates and the optimizer anew, or "
                    "add it with add_param_group()"
                )

    def moved(self) -> bool:
        """Whether parameters are on another device or of another dtype than at the last call."""
        before, self._places = self._places, self._placed()
        return before != self._places
