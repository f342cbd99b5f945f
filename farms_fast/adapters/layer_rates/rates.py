"""Learning rates per layer from alpha, beside any optimizer and scheduler."""

from __future__ import annotations

import glob
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.decisions import decide
from farms_fast.adapters.layer_rates.logs import Log, Logs, logs_of
from farms_fast.adapters.layer_rates.norm_partners import norm_partners
from farms_fast.adapters.layer_rates.optimizer_groups import (
    Assignment,
    Group,
    NoDecay,
    OptimizerGroups,
    check_rate,
)
from farms_fast.adapters.layer_rates.ranks import (
    PendingAnalysis,
    ProcessGroup,
    compute_once,
    ranks_of,
)
from farms_fast.adapters.layer_rates.rate_table import RateTable, read_state, shapes_of
from farms_fast.adapters.layer_rates.tuned_layers import (
    Blocks,
    ParameterCheck,
    block_names,
    plain_model,
    require_layers,
    tuned_layers,
)
from farms_fast.core.arguments import check_flag, check_int, check_module
from farms_fast.core.jsonable import plain
from farms_fast.live import LayerAlpha, LiveAnalysis, PendingAlphas
from farms_fast.spectra.windows import FixedAspectSampling, Sampling
from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.stacks import WeightTransform

DEFAULT_SAMPLING = FixedAspectSampling()


class RateWarning(UserWarning):
    """A layer keeps the base rate because it has no alpha."""


class LayerRates(ABC):
    """The base of all rules that make a layer's learning rate from its alpha.

    A subclass turns scores into factors, in `factors`. This class assigns parameters to layers,
    makes the groups for the optimizer, analyses the weights, treats layers without a fit, shares
    rates between processes, and resumes.

    The group "rest" has what is not tuned. Its rate is the base rate; the scheduler sets it, and
    `step` never changes it. It comes first and exists even where it is empty, which torch's
    optimizers accept. After each `scheduler.step()`, `step` sets every other group to the base
    rate times its factor, whatever the scheduler wrote there.

    Args:
        model: the module in training; it may be wrapped by `torch.compile`, DataParallel or
            DistributedDataParallel.
        sampling: the windows; `FullMatrix()` for alpha without FARMS.
        xmin: where a tail starts, as in `farms_fast.fit_power_law`.
        per: "layer", "block" (the layers of a transformer's or residual block have the mean of
            their alphas as one score, and one factor), or a function from a layer's name to its
            block's.
        xmin_pos: for the median rule.
        bins: for the peak rule.
        skip_first: the first of the chosen layers (see `include` and `exclude`) keeps the base
            rate, trained or frozen.
        skip_last: the last of them keeps it.
        min_evals: layers with fewer eigenvalues keep it too, or take their block's rate.
        evals_threshold: smaller eigenvalues are left out.
        norm: which layer's rate a normalisation gets: "name" (`bn1` goes with `conv1`,
            `downsample.1` with `downsample.0`), "order" (the normalisation after a layer goes
            with it if their features agree), or None (the base rate).
        every: every so many calls of `step` make new rates.
        unit: what a call stands for, "epoch" or "step" of the optimizer; for the callbacks.
        overlap: analyse a snapshot while training goes on, and use its rates from the next call.
        initial: make the first rates from the initial weights, as published; otherwise all rates
            are equal at first.
        include: globs of layer names to tune, None for all.
        exclude: globs of layer names to leave alone.
        dtype: the precision to compute in.
        solver: for the eigenvalues, None for the fastest.
        memory: bytes that an analysis may take on the device.
        process_group: the processes that share rates; the first one computes them. "default" is
            the group of torch.distributed where it is initialised; None is this process alone.
        log: what gets every new table, on the first rank: a function, the path of a CSV file, or
            several of them. The initial table follows when training begins.
        change: what stands for the model's weights, as in `layers_from_module`.

    Attributes:
        model: the plain module.
        layers: the layers and their parameters, in the model's order.
        blocks: the block of each layer.
        partners: the layer of each normalisation that has one, by name.
        skipped: tensors that are no layers.
        frozen: names of the parameters that are not trained and are in no group.
        factors_by_layer: rate over base rate, of the layers that have a rate of their own.
        last: the table that the last call acted on; None before.
        calls: how often `step` was called.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range, or the model has no layer to tune.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling = DEFAULT_SAMPLING,
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
        self._parameter_check = ParameterCheck(self.model)
        self.every = check_int("every", every, least=1)
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit: expected 'epoch' or 'step', got {unit!r}")
        self.unit = unit
        self.overlap = check_flag("overlap", overlap)
        self.initial = check_flag("initial", initial)
        self.process_group = process_group
        ranks_of(process_group)
        specs, self.skipped = layers_from_module(self.model, include, exclude, change=change)
        self.layers = tuned_layers(self.model, specs)
        self.blocks = block_names(self.model, self.layers, per)
        first, last = check_flag("skip_first", skip_first), check_flag("skip_last", skip_last)
        if self.layers and last:
            self.layers[-1].edge = "the last layer (skip_last)"
        if self.layers and first:
            self.layers[0].edge = "the first layer (skip_first)"
        require_layers(self.layers, self.skipped)
        owners = {owner: layer.name for layer in self.layers for owner in layer.owners}
        self.partners = norm_partners(self.model, norm, owners)
        rule = {"sampling": sampling, "xmin": xmin, "xmin_pos": xmin_pos, "bins": bins}
        limits = {"min_evals": min_evals, "evals_threshold": evals_threshold, "memory": memory}
        chosen = {"include": include, "exclude": exclude, "change": change}
        numerics = {"dtype": dtype, "solver": solver}
        self._analysis: dict[str, Any] = {**rule, **limits, **chosen, **numerics}
        if any(layer.frozen for layer in self.layers):  # frozen layers are not analysed
            trained = [s.name for layer in self.layers if not layer.frozen for s in layer.specs]
            self._analysis |= {"include": [glob.escape(n) for n in trained], "exclude": None}
        self._live: LiveAnalysis | None = LiveAnalysis(self.model, **self._analysis)
        self._assignment: Assignment | None = None
        self._groups: OptimizerGroups | None = None
        self._ahead: PendingAnalysis | None = None
        self.logs: list[Log] = logs_of(log)
        self.last: RateTable | None = None
        self.calls = 0
        # The initial table is logged when training begins: a run that resumes has another one.
        self._pending_log: RateTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the analysis and the optimizer's groups, which are found again."""
        state = self.__dict__ | {"_live": None, "_groups": None}
        if self._ahead is not None and isinstance(self._ahead.outcome, PendingAlphas):
            self._ahead.result()  # which can be copied, unlike what is under way on a device
        return state

    @classmethod
    def _check_options(cls, options: Mapping[str, object]) -> None:
        """Raises TypeError, naming the rule, for an option that `LayerRates` does not take."""
        known = set(inspect.signature(LayerRates).parameters)
        for name in options:
            if name not in known:
                takes = known | set(inspect.signature(cls).parameters) - {"options"}
                raise TypeError(
                    f"{name}: no argument of {cls.__name__}, which takes {', '.join(sorted(takes))}"
                )

    @abstractmethod
    def factors(self, scores: Sequence[float]) -> Sequence[float]:
        """Returns a positive factor for each kept layer or block.

        Args:
            scores: at least two alphas, or their means over blocks, not all equal, in the
                model's order.
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
        """Makes parameter groups for any torch optimizer, each trainable parameter in one.

        Args:
            lr: the base rate.
            no_decay: what is not decayed: "vectors" (biases, normalisations, and parameters with
                one dimension besides those of 1, except weights of linear layers and
                convolutions), or globs of parameter names. Such parameters of a layer have a
                group of their own, at the layer's rate.
            **options: further entries of every group, such as `weight_decay`.

        Returns:
            The group "rest" and one for each tuned layer, with the entries `params`, `lr`, `name`
            and `layer`, and those of `options`.

        Raises:
            TypeError: the rate is no number, or `no_decay` is something else.
            ValueError: the rate is negative, a glob matches no parameter, or an option is an entry
                that this method sets.
        """
        base = check_rate(lr)
        live = self._current_analysis()
        if self.last is None:
            ranks = ranks_of(self.process_group)
            self._adopt(compute_once(ranks, live) if self.initial else [])
            assert self.last is not None
            self.last = self._pending_log = self.last.at(base)
        self._groups = None
        self._assignment = Assignment.of(self.model, self.layers, self.partners)
        exempt = self._assignment.undecayed(self.model, self.layers, no_decay)
        return self._assignment.groups(lr, self.factors_by_layer, exempt, options)

    def step(self, optimizer: Optimizer, lr: float | None = None) -> RateTable:
        """Sets the rates, making new ones at every `every`-th call; follows `scheduler.step()`.

        Args:
            optimizer: made from `param_groups`.
            lr: the base rate, which the group "rest" gets too; None takes the rate of this group,
                as the scheduler set it.

        Returns:
            The table that it acted on, also in `last`.

        Raises:
            ValueError: the optimizer has other groups, or the model has changed since this object
                was made.
            TypeError: `optimizer` is no optimizer.
            RuntimeError: another rank failed.
        """
        groups, base = self._groups_of(optimizer, lr)
        self._log_initial()
        ranks = ranks_of(self.process_group)
        self.calls += 1
        measured: list[LayerAlpha] | None = None
        if self._ahead is not None:
            measured = compute_once(ranks, self._ahead.result)
            self._ahead = None
        if self.calls % self.every == 0:
            live = self._current_analysis()
            optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._parameter_check.check_trained(optimized)
            if self.overlap:
                self._ahead = PendingAnalysis.start(live, ranks)
            else:
                measured = compute_once(ranks, live)
        if measured is not None:
            self._adopt(measured)
        groups.set_rates(base, self.factors_by_layer)
        assert self.last is not None  # param_groups has made one
        self.last = self.last.at(base, self.calls)
        if measured is not None:
            self._log(self.last)
        return self.last

    def apply(self, optimizer: Optimizer, lr: float | None = None) -> None:
        """Sets the rates again, as `step` does, without making new ones or counting a call.

        A scheduler that steps more often than rates are made needs it after each of its steps.

        Args:
            optimizer: as in `step`, and so is `lr`.
            lr: see there.

        Raises:
            ValueError: as in `step`.
            TypeError: as in `step`.
        """
        groups, base = self._groups_of(optimizer, lr, search=False)
        self._log_initial()
        groups.set_rates(base, self.factors_by_layer)

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers, text and None (for NaN), from which a run goes on as if unbroken.

        It waits for an analysis that is under way, which becomes part of the state.
        """
        rows: list[LayerAlpha] | None = None
        if self._ahead is not None:  # the other ranks know only that an analysis is under way
            rows = [] if self._ahead.outcome is None else self._ahead.result()
        return {
            "rule": type(self).__name__,
            "settings": dict(self.settings),
            "calls": self.calls,
            "layers": shapes_of(self.layers),
            "last": None if self.last is None else self.last.to_state(),
            "ahead": None if rows is None else [plain(asdict(row)) for row in rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave; the optimizer's own state has the rates.

        Args:
            state: of the same rule with the same settings, on a model of the same layers.

        Raises:
            ValueError: it is of another rule or another model, or damaged; nothing is changed then.
            TypeError: it is no state.
        """
        rule = type(self).__name__
        self.calls, self.last, rows = read_state(state, rule, self.settings, self.layers)
        self._pending_log = None
        self._ahead = None if rows is None else PendingAnalysis(rows)

    def _groups_of(
        self, optimizer: Optimizer, lr: float | None, *, search: bool = True
    ) -> tuple[OptimizerGroups, float]:
        """The groups and the base rate; without `search`, known groups are taken if still there."""
        if self._assignment is None:
            raise ValueError(
                "optimizer: expected one that was made from param_groups(), which was not called"
            )
        if search or self._groups is None or not self._groups.still_of(optimizer):
            self._groups = OptimizerGroups.of(optimizer, self._assignment)
        return self._groups, self._groups.base_rate(lr)

    def _current_analysis(self) -> LiveAnalysis:
        """The analysis for the model's device and dtype; ValueError if parameters have changed."""
        self._parameter_check.check_unchanged()
        if self._parameter_check.moved() or self._live is None:
            self._live = LiveAnalysis(self.model, **self._analysis)
        return self._live

    def _adopt(self, measured: Sequence[LayerAlpha]) -> None:
        """Makes factors from alphas, and warns of layers that have failed since the last time."""
        alphas = {row.name: row for row in measured}
        before = {} if self.last is None else {row.name: row.status for row in self.last}
        rows = decide(self.layers, self.blocks, alphas, self.factors, before)
        known = set() if self.last is None else {row.name for row in self.last.failed}
        self.last = RateTable(self.calls, 0.0, tuple(rows))
        for row in self.last.failed if self._is_main else ():
            if row.name not in known:
                warnings.warn(
                    f"{row.name} keeps the base rate: {row.message}", RateWarning, stacklevel=3
                )

    @property
    def _is_main(self) -> bool:
        """Whether this process computes, warns and logs."""
        return ranks_of(self.process_group).is_main

    def _log_initial(self) -> None:
        table, self._pending_log = self._pending_log, None
        if table is not None:
            self._log(table)

    def _log(self, table: RateTable) -> None:
        for log in self.logs if self._is_main else ():
            log(table)
