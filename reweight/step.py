"""MetaReweightStep: the order of events in one training step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchopt.base import GradientTransformation

from reweight._checks import check_flag, check_scale
from reweight._meta.estimators import Estimator
from reweight._meta.examination import examine
from reweight._meta.learners import learner_of
from reweight._meta.lookahead import Lookahead
from reweight._meta.problem import FirstForward, gradients_of
from reweight._optimizers.accepted import AnyOptimizer, Exactness, as_optimizers, held_by
from reweight._passes.compiled import CompiledModel, again_if_need_be
from reweight._passes.forward import ExitForward, FeatureFunction, LossFunction, require_graph
from reweight._passes.hooks import GradientHooks
from reweight._passes.primal_cache import PrimalCache
from reweight._passes.snapshots import Beginning, Gradients
from reweight._ranks.collectives import joined
from reweight._ranks.shards import begin_anew, parameters_of, sharded_modules
from reweight._ranks.wrappers import averages, is_unsettled, unwrap
from reweight.batches import Batch, unpack
from reweight.direct_weights import DirectWeights
from reweight.losses import ExitLosses, exit_cross_entropy
from reweight.objectives import Objective
from reweight.result import StepCheck, StepResult, Update
from reweight.reweighter import SampleReweighter


class MetaReweightStep:
    """Takes the place of ``loss.backward()``: learns the weights, then adds the weighted gradient.

    The reweighter is trained by differentiating the loss on the meta batch, after the optimizer's
    next step, by the weights of that step. All else stays with the caller: clipping, schedulers.
    The extra passes use batch statistics, leave buffers alone and replay the random state: with
    weights of 1 training is bitwise as without (on a GPU but for dropout inside attention).

    Args:
        model: returns the logits of K exits, in a form of :func:`exit_cross_entropy`. In
            ``DistributedDataParallel`` or ``fully_shard`` the step is that of all batches joined.
        optimizer: one or several, of any class of torch.optim's form or of torchopt, of the model's
            parameters; read at every step, never changed. A class without a rule here has its own
            ``step`` recorded, and verified at its first use. A bare gradient transformation of
            torchopt gets an optimizer: ``step.optimizers[0]``.
        reweighter: g, with the model's number of exits; or :class:`DirectWeights`.
        reweighter_optimizer: moves the reweighter. Default: AdamW, learning rate and weight decay
            1e-4 as published; the rate of the sigmoid form is 1e-3 times the interval, up to 1e-2.
        objective: the meta loss. Default ``BudgetedObjective()``, of direct weights the mean.
        interval: update the reweighter at every interval-th call of ``backward``, accumulating
            ones too, from the first on. Default 1 (published: 1 CIFAR, 100 ImageNet).
        estimator: "forward" (exact, a forward-mode pass), "finite_difference" (approximate),
            "unrolled" (exact, double backward), or "auto" (default): forward while that works.
        pseudo_update: "exact" (default), or "gradient_descent": judge by a plain gradient step with
            the optimizer's learning rate, an approximation where its own has no derivative.
        loss: (logits, target) → :class:`ExitLosses` or losses [B, K].
        exits: takes the logits out of what the model returns. Default None: it returns them.
        features: (inputs, target) → what weights may see besides, [B, F] or [B, T, F].
        clip_grad_norm: the norm to which you clip the gradient before ``optimizer.step()``, for the
            pseudo update; calling the step clips by itself. Default: no clipping.
        clip_hypergradient: what the norm of ∂L_meta/∂w is scaled down to if larger. Default: any.
        scaler: the GradScaler you train with, so that gradients are scaled as by
            ``scaler.scale(loss).backward()``. It is never stepped, updated or unscaled here.
        lean: make the graph of the train batch twice, not to keep it: about the memory of a plain
            step, for one more forward; the same results. Default False.
        lagged: train first and learn from that step, which acts one step later: saves a backward,
            or without a meta batch a meta pass as well. Default False.
        train_fraction: the share of the train batch, drawn anew, that an update learns from; losses
            have the samples first. Noisier, unbiased but for BatchNorm and dropout. Default 1.
        moves: parameter name → whether the look-ahead moves it: what the weights do through others,
            also to the norm that is clipped, is left out. Default: all of them.

    Raises:
        TypeError: an argument is of another type, or the optimizer turns out without derivative.
        ValueError: an argument is out of range, or another on another rank.

    Example:
        >>> model = nn.Linear(4, 3)  # a single exit; with more, return the logits of each
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> step = MetaReweightStep(model, optimizer, SampleReweighter(num_exits=1))
        >>> train, meta = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
        >>> step.backward(train, meta).weights.shape
        torch.Size([6, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer | GradientTransformation | Sequence[AnyOptimizer],
        reweighter: SampleReweighter | DirectWeights,
        *,
        reweighter_optimizer: Optimizer | None = None,
        objective: Objective | None = None,
        interval: int = 1,
        estimator: str = "auto",
        pseudo_update: Exactness = "exact",
        loss: LossFunction = exit_cross_entropy,
        exits: Callable[[Any], Any] | None = None,
        features: FeatureFunction | None = None,
        clip_grad_norm: float | None = None,
        clip_hypergradient: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        lean: bool = False,
        lagged: bool = False,
        train_fraction: float = 1.0,
        moves: Callable[[str], bool] | None = None,
    ) -> None:
        check_flag("lean", lean)
        check_flag("lagged", lagged)
        self._inner, self._group = unwrap(model)
        self.model, self.reweighter, self.lean, self.lagged = model, reweighter, lean, lagged
        self.optimizers = as_optimizers(optimizer, list(model.parameters()))
        learning = reweighter_optimizer, interval, clip_hypergradient
        self._learner = learner_of(reweighter, *learning, lagged=lagged)
        self.reweighter_optimizer = self._learner.optimizer
        alone = self._group is None and estimator in ("auto", "forward")
        compiled = CompiledModel.of(self._inner) if alone else None
        loss = self._learner.loss(loss)
        self._forward = ExitForward(model, self._inner, exits, loss, compiled, features)
        self._lookahead = Lookahead(
            model=self._inner,
            forward=self._forward,
            optimizers=self.optimizers,
            objective=self._learner.default_objective() if objective is None else objective,
            exactness=pseudo_update,
            clip_grad_norm=clip_grad_norm,
            scaler=scaler,
            train_fraction=train_fraction,
            moves=moves,
        )
        other_ways = lagged or train_fraction < 1 or sharded_modules(self._inner) or compiled
        self._hooks = GradientHooks(self._inner)
        self._estimator = Estimator(estimator, may_unroll=not other_ways)
        options = (estimator, interval, lean, lagged, train_fraction, clip_hypergradient)
        self._learner.require_same(options, self._group, next(model.parameters()).device)

    def __call__(self, train: Batch, meta: Batch | None = None) -> StepResult:
        """``zero_grad``, :meth:`backward`, clipping if it is asked for, and ``optimizer.step``."""
        self._lookahead.require_unscaled()
        gradients = Gradients(held_by(self.optimizers))
        gradients.clear()
        try:
            result = self.backward(train, meta)
        except BaseException:
            gradients.restore()
            raise
        self._lookahead.clip()
        for optimizer in self.optimizers:
            optimizer.step()
        return result

    @again_if_need_be
    def backward(
        self, train: Batch, meta: Batch | None = None, *, scale: float | Tensor = 1.0
    ) -> StepResult:
        """Update the reweighter if it is due, then add the gradient of L_tr to ``.grad``.

        What ``.grad`` holds already counts as part of the optimizer's next step.

        Args:
            train: (inputs, target) of the batch to train on.
            meta: (inputs, target) of the batch that judges the step. With ``lagged`` it may be left
                out: then the train batch of the next call judges it, in the forward that it trains
                by. Call ``optimizer.step()`` in between, and leave this batch as it is until then.
            scale: factor of the gradient; 1/n where the gradients of n calls are accumulated for
                one step, or the share of all their tokens that this batch has.

        Raises:
            TypeError: a batch is no pair or is missing, or the model returns something unexpected.
            ValueError: shapes or numbers of exits disagree, a batch is empty, a target is out of
                range, or no loss depends on a parameter. Nothing has changed then, unless the very
                last backward fails while gradients are accumulated.
        """
        check_scale("scale", scale)
        train = unpack(train, "`train`")
        meta = None if meta is None and self.lagged else unpack(meta, "`meta`")
        waiting, postponed = self._lookahead.still_waiting() if meta is None else None, None
        beginning, cache, update = Beginning(self._inner), PrimalCache(self._inner), None
        due = self._learner.is_due
        moved, lagged = self._lookahead.moved() if due else {}, due and self.lagged
        # If the backward is not the last thing that may fail, what it adds to must be copied.
        own = [*parameters_of(self._inner).values(), *held_by(self.optimizers)]
        gradients = Gradients(own, copy=lagged or self._hooks.exist)
        # A static graph wants its first forward followed by its backward and by nothing else.
        unsettled = due and not lagged and is_unsettled(self.model)
        lean = self.lean or unsettled
        spare = cache.take(train, self._forward.spare(train))
        forward = partial(self._forward, beginning=beginning)
        try:
            attention = self._estimator.attention(beginning, due and self._forward.compiled is None)
            with attention, joined(self._group), begin_anew(self._inner):
                within = self._estimator.within(cache) if due and not lean else None
                batch = self._forward.spare(train) if due and lean else train
                losses = forward(*batch, within=within, wrapped=not unsettled)
                losses = self._forward.with_features(require_graph(losses), spare)
                shares = losses.sample_shares()
                grads = gradients_of(moved, copy=lagged)  # whose backward has added to them by then
                grads = self._lookahead.beside(grads, losses, moved, scale)
                parts = losses, cache, moved, grads, scale * shares, not lean
                first = FirstForward(spare, beginning, *parts)
                if waiting is not None:
                    update = self._update(waiting, losses)
                if due and not lagged and meta is not None:
                    update = self._update(first, meta)
                    if lean:  # once more from the beginning: the same losses, a new graph
                        beginning.restore()
                        losses = forward(*train)._replace(features=losses.features)
                weights = self._learner.weights(losses, update)
                with self._hooks.watched(was_left_out=update is not None and not lagged):
                    self._lookahead.backward(first, losses, weights, scale, lagged and not lean)
                if lagged:
                    grads = gradients_of(moved, average=not averages(self.model))
                    first = first._replace(gradients=grads)
                    if meta is None:
                        postponed = self._lookahead.postponed(first, weights)
                    else:
                        update = self._update(first, meta)
        except BaseException:
            beginning.restore()
            gradients.restore()
            if update is not None:
                update.undo()
            raise
        self._learner.num_calls += 1
        self._lookahead.waiting = postponed
        return StepResult.of(losses, weights, update, shares if self._group is None else None)

    @again_if_need_be
    def update_reweighter(self, train: Batch, meta: Batch) -> StepResult:
        """Update the reweighter and nothing else, for loops that keep their own forward.

        Parameters, buffers, ``.grad``, optimizer state and random state stay bitwise as they are.
        ``.grad`` and ``interval`` play no part; arguments and errors are as in :meth:`backward`.
        """
        train, meta = unpack(train, "`train`"), unpack(meta, "`meta`")
        self._learner.require_trainable()
        beginning, cache = Beginning(self._inner), PrimalCache(self._inner)
        moved, keep = self._lookahead.moved(), not self.lean

        def learn(losses: ExitLosses) -> tuple[ExitLosses, Tensor, Update]:
            losses = self._forward.with_features(require_graph(losses), train)
            parts = losses, cache, moved, self._lookahead.beside({}, losses, moved, 1.0)
            first = FirstForward(train, beginning, *parts, losses.sample_shares(), keep)
            update = self._update(first, meta, real=False)
            return losses, self._learner.weights(losses, update), update

        try:
            attention = self._estimator.attention(beginning, self._forward.compiled is None)
            with attention, joined(self._group), begin_anew(self._inner):
                learnt = self._forward.at({}, beginning.buffers, *train, learn, within=cache)
        finally:
            beginning.replay()
        return StepResult.of(*learnt)

    def check(self, train: Batch, meta: Batch) -> StepCheck:
        """What to know before a long run: ``print(step.check(train, meta))``.

        It takes a few steps with copies of the reweighter; nothing of yours changes. Arguments and
        errors are those of :meth:`backward`; :class:`StepCheck` says what comes back.
        """
        return examine(self, train, meta)

    def state_dict(self) -> dict[str, Any]:
        """Everything the step adds to a training run: tensors, numbers, text and containers."""
        return self._learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, or raise ValueError with nothing loaded."""
        self._learner.load_state_dict(state_dict)
        self._lookahead.waiting = None

    def _update(self, first: FirstForward, meta: Batch | ExitLosses, real: bool = True) -> Update:
        """Learn from one meta step after the forward of the train batch."""
        if not first.accumulated:
            self._learner.warn_if_cold(self.optimizers)
        after = Beginning(self._inner)
        weights, seed = self._learner.ahead(first.losses), self._learner.num_updates
        problem = self._lookahead.problem(first, after, meta, weights, seed)
        problem.begins_at_zero = self._learner.begins_at_zero
        owned = Gradients([*problem.everything.values(), *held_by(self.optimizers)])
        with owned.taken_away(), self._hooks.left_out(will_be_watched=real):  # may be added to
            hypergradient = self._estimator(problem)
        after.restore()  # buffers too: checkpointing runs the model again in each backward
        update = self._learner.learn(first.losses, weights, hypergradient)
        self._estimator.check.expect(update.difference, problem.precision)
        return update

    @property
    def num_skipped(self) -> Tensor:
        """How many updates were left out for a value that was not finite."""
        return self._learner.num_skipped

    @property
    def estimator(self) -> str:
        """The estimator in use; "auto" is forward mode, as long as it stands here."""
        return self._estimator.name
