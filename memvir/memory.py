"""MemVir: past steps' embeddings and proxies as virtual classes (Ko, Gu, Kim, ICCV 2021), exactly, in O(N) per step.

At step t the loss sees, besides its B embeddings and C proxies, those of the N past steps t - k(M+1), k = 1..N, as
constants; the k-th contributes C classes of its own: a past embedding of label y has label y + k*C. Written out, that
is a matrix of (N+1)B x (N+1)C logits per step, O(N^2). But a logit between two past steps never changes, and the steps
selected at t are selected again at t + (M+1), all but the oldest, with t itself. So each residue class of t mod (M+1)
is a ring of N slots, one per step, which keeps for each slot i and slot j the log-sum-exp of every row in i over the
columns in j, and each step computes only the two strips that hold something new:

    lse(current row) = logaddexp(current columns, logsumexp over slots of the past columns)   B x NC logits, new
    lse(past row)    = logaddexp(current columns, logsumexp over slots of the cached lse)     NB x C logits, new

Both strips' log-sum-exps per slot are the next turn's cache. Rows are the loss's anchors and columns what they are
compared with: embeddings and proxies, or for Proxy-Anchor proxies and embeddings. Notation: B embeddings in a step, C
classes, D dimensions, A anchors and K others (B and C, or C and B), n <= N slots in use.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from memvir.errors import UserError
from memvir.foreign import call_with, number_of_classes, proxies_of, proxy_parameter, try_more_classes
from memvir.losses.checks import FiniteRows, checked_labels
from memvir.losses.logsumexp import MASKED, without_autocast
from memvir.losses.proxy_loss import ProxyLoss
from memvir.losses.with_past import CombinedWithPast
from memvir.wrappers.wrapper import LossWrapper

# What follows the rows of a short batch in each buffer; a padded anchor counts 0
PADDING = {"past_embeddings": 0, "past_labels": -1, "past_proxies": 0, "past_positive": 0, "past_counted": 0}

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # float16 overflows beyond 65,504


class MemVir(LossWrapper):
    """A proxy loss with virtual classes from memory: forward(embeddings (B, D), labels (B,)) -> scalar.

    Args:
        loss: one of `memvir.losses`, or any module with the same forward and a parameter `proxies` (C, D), or `W` or
            `fc` (D, C) as in pytorch-metric-learning. Such a one works unmodified, by concatenation in O(N^2), if it
            takes the number of classes from the parameter's shape or keeps it as `num_classes`, with several proxies
            to a class too, side by side. Calls with 2C classes try that here, on copies.
        num_steps: N, how many past steps become virtual classes; 0 is the plain loss.
        step_gap: M, how many steps are left out between two selected ones.
        storage_dtype: how stored embeddings and proxies are kept: "float32", "bfloat16" or "float64", or torch's;
            by default the type that the loss computes in. Arithmetic is in at least float32 in any case.
        concatenate: take the O(N^2) way of the definition for every loss. Its scale and margin may then be changed
            while it trains; otherwise that is a UserError, as the memory holds sums that depend on them.

    While `enabled` is False (warm-up), and in eval mode, this is the plain loss: nothing is stored or used. The memory
    is allocated at the first step, grows if a later batch is larger, and is all in state_dict(). Every forward in
    train mode is a step, under torch.no_grad() too: validate in eval mode. With gradient accumulation each part of a
    batch is a step. For the losses of `memvir.losses` forward takes the gradients too, and backward() hands them out.

    A row of embeddings or proxies that is not finite makes the loss and all gradients nan, so that a GradScaler skips
    the step, but is remembered as zeros, which are similar to nothing, and so does no harm to later steps.
    """

    past_embeddings: Tensor
    past_labels: Tensor
    past_proxies: Tensor
    past_positive: Tensor
    past_counted: Tensor
    block_lse: Tensor

    def __init__(
        self,
        loss: nn.Module,
        num_steps: int,
        step_gap: int,
        storage_dtype: str | torch.dtype | None = None,
        concatenate: bool = False,
    ):
        super().__init__(loss)
        if not all(isinstance(number, Integral) and number >= 0 for number in (num_steps, step_gap)):
            raise UserError(
                f"MemVir needs num_steps and step_gap of 0 or more, not {num_steps} and {step_gap}; use whole numbers"
            )
        if isinstance(storage_dtype, str):
            storage_dtype = getattr(torch, storage_dtype, storage_dtype)
        if storage_dtype is not None and storage_dtype not in STORAGE_DTYPES:
            raise UserError(f"MemVir's storage_dtype is float32 or bfloat16, not {storage_dtype!r}")
        self._parameter = proxy_parameter(loss)
        self.num_steps, self.step_gap = int(num_steps), int(step_gap)
        assert not isinstance(storage_dtype, str)
        self.storage_dtype = storage_dtype
        self.concatenate = concatenate or not isinstance(loss, ProxyLoss)
        self.num_classes = number_of_classes(loss, self._parameter)  # C
        self._step = 0  # steps stored so far, the pending one included
        self._slots_used = 0  # n of the last forward
        self._sizes = [[0] * self.num_steps for _ in range(self.step_gap + 1)]  # embeddings in each slot
        self._pending: dict[str, Tensor] = {}  # what the last step leaves, written at the start of the next
        self._numbers: dict[str, float] = {}  # of the loss, with which the log-sum-exps were computed
        for name in self._layout(0):
            self.register_buffer(name, None)
        if num_steps and not isinstance(loss, ProxyLoss):
            try_more_classes(loss, self._parameter, self.num_classes)

    @property
    def proxies(self) -> Tensor:
        """(C, D), or of a loss with several proxies to a class (C * as many, D)."""
        return proxies_of(self.loss, self._parameter)

    @property
    def num_virtual_classes(self) -> int:
        """How many virtual classes the last forward used."""
        return self._slots_used * self.num_classes

    @property
    def num_virtual_embeddings(self) -> int:
        """How many past embeddings the last forward used."""
        residue, _ = self._place(self._step - 1)
        return sum(self._sizes[residue][: self._slots_used])

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        labels = checked_labels(embeddings, labels, self.proxies, self.num_classes)
        with without_autocast(embeddings.device):
            embeddings = embeddings.to(self.dtype)
            if not (self.active and self.num_steps):
                self._slots_used = 0
                if isinstance(self.loss, ProxyLoss):
                    return self.loss(embeddings, labels)
                # pytorch-metric-learning's make their parameter's type that of the embeddings: here only a copy's
                return call_with(
                    self.proxies.to(self.dtype), self.num_classes, self.loss, self._parameter, embeddings, labels
                )
            numbers = self._numbers if self.concatenate else self.loss.numbers
            if self._step and numbers != self._numbers:
                before, now = (", ".join(f"{k}={v}" for k, v in them.items()) for them in (self._numbers, numbers))
                raise UserError(
                    f"MemVir's memory holds sums of a loss with {before}, which now has {now}; to change that while it "
                    "trains, build MemVir with concatenate=True"
                )
            self._commit()
            self._reserve(len(embeddings), embeddings.device)
            compute = self._concatenated if self.concatenate else self._two_strips
            residue, turn = self._place(self._step)
            n = min(turn, self.num_steps)
            embeddings, proxies, one = FiniteRows.apply(embeddings, self.proxies.to(self.dtype))
            loss, pending = compute(embeddings, proxies, labels, residue, turn, n)
        # together, so that a step which fails has not happened
        self._pending, self._step, self._slots_used, self._numbers = pending, self._step + 1, n, numbers
        return loss * one

    def steps_in_use(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """The past steps that the last forward used, newest first: (k, embeddings (b, D), labels (b,), proxies (C, D)).

        k counts from 1: the step was k(M+1) steps before the last one.
        """
        return self._past_steps(*self._place(self._step - 1), self._slots_used)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _two_strips(
        self, embeddings: Tensor, proxies: Tensor, labels: Tensor, residue: int, turn: int, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The O(N) way: see the top of this file. Returns the loss and what `_commit` shall write."""
        loss = self.loss
        embeddings, proxies = loss.inputs(embeddings, proxies)  # (B, D), (C, D)
        own, positive, counted = loss.block(embeddings, proxies, labels)  # (A,) each
        pending = self._stored(embeddings, labels, proxies)
        pending |= {"past_positive": positive.detach(), "past_counted": counted, "own": own.detach()}
        if n == 0:
            return loss.combine(own, positive, counted)[0], pending

        past_embeddings = self.past_embeddings[residue, :n].flatten(0, 1).to(embeddings.dtype)  # (nB, D), a view
        past_proxies = self.past_proxies[residue, :n].flatten(0, 1).to(embeddings.dtype)  # (nC, D), a view
        if loss.anchors_are_proxies:
            anchors, others, past_anchors, past_others = proxies, embeddings, past_proxies, past_embeddings
            padding = MASKED * (self.past_labels[residue, :n].flatten() < 0)  # (nB,): the end of a short batch
        else:
            anchors, others, past_anchors, past_others = embeddings, proxies, past_embeddings, past_proxies
            padding = None
        value, across, down = CombinedWithPast.apply(
            loss,
            own,
            positive,
            anchors,
            others,
            counted,
            self.block_lse[residue, :n, :, :n],
            self.past_positive[residue, :n],
            self.past_counted[residue, :n],
            past_anchors,
            past_others,
            padding,
        )
        return value, pending | {"across": across, "down": down}

    def _concatenated(
        self, embeddings: Tensor, proxies: Tensor, labels: Tensor, residue: int, turn: int, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The definition, for a loss of any kind: one call with everything, O(N^2) logits."""
        steps = self._past_steps(residue, turn, n)
        loss = call_with(
            torch.cat([proxies, *(past for _, _, _, past in steps)]),  # ((n+1)C, D)
            (n + 1) * self.num_classes,
            self.loss,
            self._parameter,
            torch.cat([embeddings, *(past for _, past, _, _ in steps)]),  # ((n+1)B, D)
            torch.cat([labels, *(past + k * self.num_classes for k, _, past, _ in steps)]),
        )
        return loss, self._stored(embeddings, labels, proxies)

    # --- the ring ----------------------------------------------------------------------------------------------------

    def _place(self, step: int) -> tuple[int, int]:
        """The residue class that a step belongs to, and its turn there; its slot is turn % N."""
        turn, residue = divmod(step, self.step_gap + 1)
        return residue, turn

    def _past_steps(self, residue: int, turn: int, n: int) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        steps = []
        for k in range(1, n + 1):
            slot = (turn - k) % self.num_steps
            size = self._sizes[residue][slot]
            embeddings = self.past_embeddings[residue, slot, :size].to(self.dtype)
            proxies = self.past_proxies[residue, slot].to(self.dtype)
            steps.append((k, embeddings, self.past_labels[residue, slot, :size], proxies))
        return steps

    def _layout(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each buffer."""
        num_proxies, dim = self.proxies.shape
        slots, dtype = (self.step_gap + 1, self.num_steps), self.dtype
        layout = {
            "past_embeddings": ((*slots, batch_size, dim), self.storage_dtype or dtype),
            "past_labels": ((*slots, batch_size), torch.int64),
            "past_proxies": ((*slots, num_proxies, dim), self.storage_dtype or dtype),
        }
        if not self.concatenate:
            num_anchors = num_proxies if self.loss.anchors_are_proxies else batch_size
            layout |= {
                "past_positive": ((*slots, num_anchors), dtype),
                "past_counted": ((*slots, num_anchors), dtype),
                # [residue, i, a, j]: log-sum-exp of anchor a of slot i over the others of slot j
                "block_lse": ((*slots, num_anchors, self.num_steps), dtype),
            }
        return layout

    @torch.inference_mode(False)  # a memory made under inference_mode could not be written by later steps
    def _reserve(self, batch_size: int, device: torch.device) -> None:
        """Allocate the memory for steps of up to `batch_size` embeddings, keeping what it holds."""
        if self.past_labels is not None and batch_size <= self.past_labels.shape[2]:
            return
        for name, (shape, dtype) in self._layout(batch_size).items():
            held, new = getattr(self, name), torch.full(shape, PADDING.get(name, 0), dtype=dtype, device=device)
            if held is not None:
                new[tuple(slice(length) for length in held.shape)] = held
            setattr(self, name, new)

    def _stored(self, embeddings: Tensor, labels: Tensor, proxies: Tensor) -> dict[str, Tensor]:
        """A step as it is stored; of the three, only the labels are the caller's to change in place."""
        dtype = self.storage_dtype or self.dtype
        return {
            "past_embeddings": embeddings.detach().to(dtype),
            "past_labels": labels.clone(),
            "past_proxies": proxies.detach().to(dtype),
        }

    def _commit(self) -> None:
        """Write the pending step into its slot, over the oldest of its residue class.

        Not at the end of its own step, whose `steps_in_use` still shows that oldest one.
        """
        if not self._pending:
            return
        pending = self._pending
        residue, turn = self._place(self._step - 1)
        slot, n = turn % self.num_steps, min(turn, self.num_steps)
        self._sizes[residue][slot] = len(pending["past_labels"])
        for name in pending.keys() & PADDING.keys():
            buffer, value = getattr(self, name), pending[name]
            buffer[residue, slot, : len(value)] = value
            if len(value) < buffer.shape[2]:
                buffer[residue, slot, len(value) :] = PADDING[name]
        if not self.concatenate:
            block_lse, num_anchors = self.block_lse[residue], len(pending["own"])
            if n:
                block_lse[:n, :, slot] = pending["down"]
                block_lse[slot, :num_anchors, :n] = pending["across"]
            block_lse[slot, :num_anchors, slot] = pending["own"]
        self._pending = {}

    # --- moving and saving -------------------------------------------------------------------------------------------

    def _memory(self) -> tuple[dict, ...]:
        return self._buffers, self._pending

    def _kept_in(self, name: str) -> torch.dtype:
        stored = self.storage_dtype if name in ("past_embeddings", "past_proxies") else None
        return stored or self.dtype

    def _settings(self) -> dict[str, Any]:
        num_proxies, dim = self.proxies.shape
        settings: dict[str, Any] = {
            "num_steps (N)": self.num_steps,
            "step_gap (M)": self.step_gap,
            "number of classes (C)": self.num_classes,
            "number of proxies": num_proxies,
            "embedding dimension (D)": dim,
            "storage_dtype": str(self.storage_dtype or self.dtype),
            "concatenate": self.concatenate,
        }
        return settings if self.concatenate else settings | {"loss": repr(self.loss)}  # whose scale the sums have

    def get_extra_state(self) -> dict:
        return {
            "settings": self._settings(),
            "numbers": self._numbers,
            "step": self._step,
            "slots_used": self._slots_used,
            "sizes": [list(sizes) for sizes in self._sizes],
            "pending": dict(self._pending),
        }

    def set_extra_state(self, state: dict) -> None:
        self._step = state["step"]
        self._slots_used = state["slots_used"]
        self._sizes = [list(sizes) for sizes in state["sizes"]]
        self._pending = dict(state["pending"])
        self._numbers = dict(state.get("numbers", self.loss.numbers if isinstance(self.loss, ProxyLoss) else {}))

    def _prepare_for(self, state_dict: dict, prefix: str) -> None:
        """Allocates what the state holds, so that a module which has seen no batch yet loads it strictly."""
        held = [name for name in self._layout(0) if prefix + name in state_dict]
        if state_dict[prefix + "_extra_state"]["step"] and len(held) < len(self._layout(0)):
            raise UserError("this state of MemVir lacks part of its memory; load all, or leave _extra_state out too")
        for name in self._layout(0):
            setattr(self, name, None)
        if held:
            self._reserve(state_dict[prefix + "past_labels"].shape[2], self.proxies.device)
