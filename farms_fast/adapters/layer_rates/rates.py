"""Learning rates per layer from alpha, beside any optimizer and scheduler."""

from __future__ import annotations

import glob
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.assignment import (
    Assignment,
    assign,
    edge_layers,
    require_layers,
)
from farms_fast.adapters.layer_rates.decay import NoDecay, undecayed
from farms_fast.adapters.layer_rates.decisions import decide
from farms_fast.adapters.layer_rates.logs import Log, Logs, logs_of
from farms_fast.adapters.layer_rates.model_watch import ModelWatch
from farms_fast.adapters.layer_rates.norm_partners import norm_partners
from farms_fast.adapters.layer_rates.optimizer_groups import (
    FoundGroups,
    Group,
    base_rate,
    check_rate,
    make_groups,
    set_rate,
)
from farms_fast.adapters.layer_rates.options import flag
from farms_fast.adapters.layer_rates.rate_state import restored, state_of
from farms_fast.adapters.layer_rates.rate_table import RateTable
from farms_fast.adapters.layer_rates.sharing import Ahead, ProcessGroup, computed_once, ranks_of
from farms_fast.adapters.layer_rates.tuned_layers import (
    Blocks,
    block_names,
    plain_model,
    tuned_layers,
)
from farms_fast.core.arguments import check_int, check_module
from farms_fast.live import LayerAlpha, LiveAnalysis
from farms_fast.spectra.windows import FixedAspectSampling, Sampling
from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.stacks import WeightTransform

__all__ = ["LayerRates", "RateWarning"]

_DEFAULT_SAMPLING = FixedAspectSampling()


class RateWarning(UserWarning):
    """A layer keeps the base rate because its alpha could not be found."""


class LayerRates(ABC):
    """What all rules have in common that make a layer's learning rate from its alpha.

    A subclass says in `factors` how scores become factors; everything else is here: which
    parameters belong to which layer, groups for the optimizer, when to analyse, what to do with
    layers that cannot be fitted, several processes, and resuming.

    The group "rest" has what is not tuned and is never touched: its rate is the base rate, which
    the scheduler sets as if there were no other. It comes first and exists even where it is empty,
    which torch's optimizers accept. After each `scheduler.step()`, `step` sets every other group
    to the base rate times its factor, whatever the scheduler made of it.

    Args:
        model: what is trained; `torch.compile`, DataParallel and DistributedDataParallel around it
            are looked through.
        sampling: the windows; `FullMatrix()` for alpha without FARMS.
        xmin: where a tail starts, as in `farms_fast.fit_power_law`.
        per: "layer", "block" (the layers of a transformer's or residual block have the mean of
            their alphas as one score, and one factor), or a function from a layer's name to its
            block's.
        xmin_pos: for the median rule.
        bins: for the peak rule.
        skip_first: the first of the chosen layers (see `include` and `exclude`) keeps the base
            rate, trained or frozen.
        skip_last: so does the last of them.
        min_evals: layers with fewer eigenvalues keep it too, or take their block's rate.
        evals_threshold: smaller eigenvalues are left out.
        norm: partners of normalisations, trained at their rate: "name" (`bn1` and `conv1`,
            `downsample.1` and `downsample.0`), "order" (the normalisation after a layer, where the
            features agree), or None (they stay with the rest).
        every: rates are made anew at every so many calls of `step`.
        unit: what a call stands for, "epoch" or "step" (of the optimizer); the callbacks for
            trainers go by it.
        overlap: analyse a snapshot while training goes on, and use its rates from the next call.
        initial: make the first rates from the initial weights, as published; else all are equal.
        include: globs of layer names to tune, None for all.
        exclude: globs of layer names to leave alone.
        dtype: the precision to compute in.
        solver: for the eigenvalues, None for the fastest.
        memory: bytes that an analysis may take on the device.
        process_group: between whose processes rates are shared: the first computes, the others
            are told. "default" is that of torch.distributed where it is initialised; None is this
            process alone.
        log: told of every new table, on the first rank: a function, the path of a CSV file, or
            several of them. The initial table follows when training begins.
        change: what stands for the model's weights, as in `layers_from_module`.

    Attributes:
        model: the plain module.
        layers: the layers and their parameters, in the model's order.
        blocks: the block of each.
        partners: the layer at whose rate each normalisation is trained, by name.
        skipped: tensors that are no layers.
        frozen: names of the parameters that are not trained and are in no group.
        factors_by_layer: rate over base rate, of the layers that have a rate of their own.
        last: the table that the last call acted on; None before.
        calls: how often `step` was called.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range, or a model without a layer to tune.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling = _DEFAULT_SAMPLING,
        xmin: str = "median",
        *,
        per: Blocks = "layer",
        xmin_pos: float = 2,
        bins: int = 100,
        skip_first: bool = False,
        skip_last: bool = False,
        min_evals: int = 0,
        evals_threshold: float = 0.0,
        norm: str | None = "name",
        every: int = 1,
        unit: str = "epoch",
        overlap: bool = False,
        initial: bool = True,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        dtype: torch.dtype = torch.float64,
        solver: str | None = None,
        memory: int | None = None,
        process_group: ProcessGroup = "default",
        log: Logs = None,
        change: WeightTransform | None = None,
    ) -> None:
        check_module("model", model)
        self.model = plain_model(model)
        self._watch = ModelWatch(self.model)
        self.every = check_int("every", every, least=1)
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit: expected 'epoch' or 'step', got {unit!r}")
        self.unit = unit
        self.overlap = flag("overlap", overlap)
        self.initial = flag("initial", initial)
        self.process_group = process_group
        ranks_of(process_group)
        specs, self.skipped = layers_from_module(self.model, include, exclude, change=change)
        self.layers = tuned_layers(self.model, specs)
        self.blocks = block_names(self.model, self.layers, per)
        self._left_alone = edge_layers(
            self.layers,
            skip_first=flag("skip_first", skip_first),
            skip_last=flag("skip_last", skip_last),
        )
        require_layers(self.layers, self._left_alone, self.skipped)
        owners = {owner: layer.name for layer in self.layers for owner in layer.owners}
        self.partners = norm_partners(self.model, norm, owners)
        self._analysis: dict[str, Any] = {
            "sampling": sampling,
            "xmin": xmin,
            "xmin_pos": xmin_pos,
            "bins": bins,
            "dtype": dtype,
            "solver": solver,
            "memory": memory,
            "min_evals": min_evals,
            "evals_threshold": evals_threshold,
            "change": change,
            "include": include,
            "exclude": exclude,
        }
        if any(layer.frozen for layer in self.layers):  # they shall cost nothing
            trained = [s.name for layer in self.layers if not layer.frozen for s in layer.specs]
            self._analysis |= {"include": [glob.escape(n) for n in trained], "exclude": None}
        self._live: LiveAnalysis | None = LiveAnalysis(self.model, **self._analysis)
        self._assignment: Assignment | None = None
        self._found: FoundGroups | None = None
        self._ahead: Ahead | None = None
        self.logs: list[Log] = logs_of(log)
        self.last: RateTable | None = None
        self.calls = 0
        # The initial table, until training begins: a run that resumes has another.
        self._untold: RateTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is made anew when it is needed: the analysis, and who has groups."""
        state = self.__dict__ | {"_live": None, "_found": None}
        if self._ahead is not None and self._ahead.pending is not None:
            state["_ahead"] = Ahead(rows=self._ahead.result())
        return state

    @abstractmethod
    def factors(self, scores: Sequence[float]) -> Sequence[float]:
        """The factor of each kept layer or block, positive, from its score.

        It is called with at least two scores, not all of them equal.

        Args:
            scores: alphas, or their means over blocks, in the model's order.
        """

    @property
    def settings(self) -> Mapping[str, object]:
        """What the factors depend on besides the scores: numbers, text and lists, for the state."""
        return {}

    @property
    def factors_by_layer(self) -> dict[str, float]:
        """Rate over base rate by layer; empty before the first analysis."""
        return {} if self.last is None else {row.name: row.factor for row in self.last}

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that are not trained."""
        return [name for name, p in self.model.named_parameters() if not p.requires_grad]

    def param_groups(
        self, lr: float | torch.Tensor, *, no_decay: NoDecay = None, **options: Any
    ) -> list[Group]:
        """Parameter groups for any torch optimizer, each trainable parameter in exactly one.

        Args:
            lr: the base rate.
            no_decay: what is not decayed: "vectors" (biases, normalisations, and what else has one
                dimension besides those of 1, but for linear layers and convolutions), or globs of
                parameter names; such parameters of a layer have a group of their own, at the
                layer's rate.
            **options: further entries of every group, such as `weight_decay`.

        Returns:
            The group "rest" and one for each tuned layer, with the entries `params`, `lr`, `name`
            and `layer`, and those of `options`.

        Raises:
            TypeError: the rate is no number, or `no_decay` something else.
            ValueError: the rate is negative, a glob matches no parameter, or an option is an entry
                that is made here.
        """
        base = check_rate(lr)
        live = self._refreshed()
        if self.last is None:
            ranks = ranks_of(self.process_group)
            if self.initial:
                self._adopt(computed_once(ranks, live))
            else:
                self._adopt([])
            assert self.last is not None
            self.last = self._untold = self.last.at(base)
        self._found = None
        self._assignment = assign(self.model, self.layers, self._left_alone, self.partners)
        trained = {n: p for _, named in self._assignment.sets() for n, p in named.items()}
        exempt = undecayed(self.model, self.layers, trained, no_decay)
        return make_groups(self._assignment, lr, self.factors_by_layer, exempt, options)

    def step(self, optimizer: Optimizer, lr: float | None = None) -> RateTable:
        """Makes new rates, if they are due, and sets them; call it after `scheduler.step()`.

        Args:
            optimizer: made from `param_groups`.
            lr: the base rate, which the group "rest" gets too; None takes that of this group, as
                the scheduler set it.

        Returns:
            The table that it acted on, also in `last`.

        Raises:
            ValueError: the optimizer has other groups, or the model has changed since this object
                was made.
            TypeError: `optimizer` is no optimizer.
            RuntimeError: another rank failed.
        """
        found, base = self._groups_of(optimizer, lr)
        self._tell_initial()
        ranks = ranks_of(self.process_group)
        self.calls += 1
        measured: list[LayerAlpha] | None = None
        if self._ahead is not None:
            measured = computed_once(ranks, self._ahead.result)
            self._ahead = None
        if self.calls % self.every == 0:
            live = self._refreshed()
            self._watch.check_trained({id(p) for g in optimizer.param_groups for p in g["params"]})
            if self.overlap:
                self._ahead = Ahead.start(live, ranks)
            else:
                measured = computed_once(ranks, live)
        if measured is not None:
            self._adopt(measured)
        self._set(found, base)
        assert self.last is not None  # param_groups has made one
        self.last = self.last.at(base, self.calls)
        if measured is not None and ranks.is_main:
            self._tell(self.last)
        return self.last

    def apply(self, optimizer: Optimizer, lr: float | None = None) -> None:
        """Sets the rates again without making new ones or counting a call.

        For a scheduler that steps more often than rates are made: call it after each step of it.

        Args:
            optimizer: as in `step`, and so is `lr`.
            lr: see there.

        Raises:
            ValueError: as in `step`.
            TypeError: as in `step`.
        """
        found, base = self._groups_of(optimizer, lr, anew=False)
        self._tell_initial()
        self._set(found, base)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and text (and None) from which a run goes on as if unbroken.

        It waits for an analysis that is under way, which becomes part of it.
        """
        ahead = self._ahead
        # On the other ranks nothing is known of it but that it is under way.
        rows = None if ahead is None else [] if ahead.elsewhere else ahead.result()
        rule = type(self).__name__
        return state_of(rule, self.settings, self.layers, self.calls, self.last, rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; rates come with the optimizer's own state.

        Args:
            state: of the same rule with the same settings, on a model of the same layers.

        Raises:
            ValueError: it is of another rule or another model, or damaged; nothing is changed then.
            TypeError: it is no state.
        """
        found = restored(state, type(self).__name__, self.settings, self.layers)
        self.calls, self.last, self._untold = found.calls, found.last, None
        self._ahead = None if found.ahead is None else Ahead(rows=found.ahead)

    def _groups_of(
        self, optimizer: Optimizer, lr: float | None, *, anew: bool = True
    ) -> tuple[FoundGroups, float]:
        """The groups and the base rate; what was found last where groups are the same objects."""
        if self._assignment is None:
            raise ValueError(
                "optimizer: expected one that was made from param_groups(), which was not called"
            )
        if anew or self._found is None or not self._found.still_of(optimizer):
            self._found = FoundGroups.of(optimizer, self._assignment)
        return self._found, base_rate(self._found, lr, self._assignment.rest_name)

    def _set(self, found: FoundGroups, base: float) -> None:
        factors = self.factors_by_layer
        for layer, group in found.layers:
            set_rate(group, base * factors.get(layer, 1.0))

    def _refreshed(self) -> LiveAnalysis:
        """The analysis, which knows where the model is; ValueError if that is another one now."""
        self._watch.check()
        if self._watch.moved() or self._live is None:
            self._live = LiveAnalysis(self.model, **self._analysis)
        return self._live

    def _adopt(self, measured: Sequence[LayerAlpha]) -> None:
        """Makes factors from alphas, and warns of layers that have failed since the last time."""
        alphas = {row.name: row for row in measured}
        left_alone = dict(self._left_alone)
        for layer in self.layers:
            if layer.frozen:
                left_alone[layer.name] = ("frozen", "its weights are not trained")
        before = {} if self.last is None else {row.name: row.status for row in self.last}
        rows = decide(self.layers, self.blocks, alphas, left_alone, self.factors, before)
        known = set() if self.last is None else {row.name for row in self.last.failed}
        self.last = RateTable(self.calls, 0.0, tuple(rows))
        is_main = ranks_of(self.process_group).is_main
        for row in self.last.failed:
            if is_main and row.name not in known:
                warnings.warn(
                    f"{row.name} keeps the base rate: {row.message}", RateWarning, stacklevel=3
                )

    def _tell_initial(self) -> None:
        table, self._untold = self._untold, None
        if table is not None and ranks_of(self.process_group).is_main:
            self._tell(table)

    def _tell(self, table: RateTable) -> None:
        for log in self.logs:
            log(table)
