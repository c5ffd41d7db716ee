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

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from memvir.errors import UserError
from memvir.losses import MASKED, ProxyLoss, without_autocast

# What follows the rows of a short batch in each buffer; a padded anchor counts 0
PADDING = {"past_embeddings": 0, "past_labels": -1, "past_proxies": 0, "past_positive": 0, "past_counted": 0}


class MemVir(nn.Module):
    """A proxy loss with virtual classes from memory: forward(embeddings (B, D), labels (B,)) -> scalar.

    Args:
        loss: one of `memvir.losses`, or any module with a parameter `proxies` (C, D) and the same forward that takes
            the number of classes from the proxies' shape; such a one works unmodified, by concatenation in O(N^2).
        num_steps: N, how many past steps become virtual classes; 0 is the plain loss.
        step_gap: M, how many steps are left out between two selected ones.
        storage_dtype: how stored embeddings and proxies are kept: "float32", "bfloat16" or a torch dtype;
            by default the type that the loss computes in. Arithmetic is in at least float32 in any case.
        concatenate: take the O(N^2) way of the definition for every loss.

    While `enabled` is False (warm-up), and in eval mode, this is the plain loss: nothing is stored or used. The memory
    is allocated at the first step, grows if a later batch is larger, and is all in state_dict(). Every forward in
    train mode is a step. For the losses of `memvir.losses` it takes the gradients too, and backward() hands them out.
    """

    loss: Any  # a ProxyLoss, or any module that looks like one from outside
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
        super().__init__()
        if num_steps < 0 or step_gap < 0:
            raise UserError(f"MemVir needs num_steps and step_gap of 0 or more, not {num_steps} and {step_gap}")
        if not isinstance(getattr(loss, "proxies", None), nn.Parameter):
            raise UserError(f"MemVir needs a loss with a parameter `proxies` (C, D); {type(loss).__name__} has none")
        if isinstance(storage_dtype, str):
            storage_dtype = getattr(torch, storage_dtype, storage_dtype)
        if storage_dtype is not None and not getattr(storage_dtype, "is_floating_point", False):
            raise UserError(f"MemVir's storage_dtype is float32 or bfloat16, not {storage_dtype!r}")
        self.loss = loss
        self.num_steps = num_steps
        self.step_gap = step_gap
        assert not isinstance(storage_dtype, str)
        self.storage_dtype = storage_dtype
        self.concatenate = concatenate or not isinstance(loss, ProxyLoss)
        self.enabled = True
        self._step = 0  # steps stored so far, the pending one included
        self._slots_used = 0  # n of the last forward
        self._sizes = [[0] * num_steps for _ in range(step_gap + 1)]  # embeddings in each slot
        self._pending: dict[str, Tensor] = {}  # what the last step leaves, written at the start of the next
        for name in self._layout(0):
            self.register_buffer(name, None)

    @property
    def proxies(self) -> nn.Parameter:
        return self.loss.proxies

    @property
    def dtype(self) -> torch.dtype:
        """What the loss computes in."""
        return torch.promote_types(self.proxies.dtype, torch.float32)

    @property
    def num_virtual_classes(self) -> int:
        """How many virtual classes the last forward used."""
        return self._slots_used * len(self.proxies)

    @property
    def num_virtual_embeddings(self) -> int:
        """How many past embeddings the last forward used."""
        residue, _ = self._place(self._step - 1)
        return sum(self._sizes[residue][: self._slots_used])

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if not (self.enabled and self.training and self.num_steps):
            self._slots_used = 0
            return self.loss(embeddings, labels)
        self._commit()
        self._reserve(len(embeddings), embeddings.device)
        compute = self._concatenated if self.concatenate else self._two_strips
        residue, turn = self._place(self._step)
        n = min(turn, self.num_steps)
        with without_autocast(embeddings.device):
            loss, pending = compute(embeddings, labels, residue, turn, n)
        # together, so that a step which fails has not happened
        self._pending, self._step, self._slots_used = pending, self._step + 1, n
        return loss

    def steps_in_use(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """The past steps that the last forward used, newest first: (k, embeddings (b, D), labels (b,), proxies (C, D)).

        k counts from 1: the step was k(M+1) steps before the last one.
        """
        return self._past_steps(*self._place(self._step - 1), self._slots_used)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _two_strips(
        self, embeddings: Tensor, labels: Tensor, residue: int, turn: int, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The O(N) way: see the top of this file. Returns the loss and what `_commit` shall write."""
        loss = self.loss
        embeddings, proxies = loss.inputs(embeddings)  # (B, D), (C, D)
        own, positive, counted = loss.block(embeddings, proxies, labels)  # (A,) each
        pending = self._stored(embeddings, labels, proxies, copy=not loss.normalised)
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
        value, across, down = _CombinedWithPast.apply(
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
        self, embeddings: Tensor, labels: Tensor, residue: int, turn: int, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The definition, for a loss of any kind: one call with everything, O(N^2) logits."""
        embeddings, num_classes = embeddings.to(self.dtype), len(self.proxies)
        steps = self._past_steps(residue, turn, n)
        proxies = torch.cat([self.proxies, *(proxies for _, _, _, proxies in steps)])  # ((n+1)C, D)
        inputs = (
            torch.cat([embeddings, *(past for _, past, _, _ in steps)]),  # ((n+1)B, D)
            torch.cat([labels, *(past + k * num_classes for k, _, past, _ in steps)]),
        )
        loss = functional_call(self.loss, {"proxies": proxies}, inputs)
        return loss, self._stored(embeddings, labels, self.proxies, copy=True)

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
        num_classes, dim = self.proxies.shape
        slots, dtype = (self.step_gap + 1, self.num_steps), self.dtype
        layout = {
            "past_embeddings": ((*slots, batch_size, dim), self.storage_dtype or dtype),
            "past_labels": ((*slots, batch_size), torch.int64),
            "past_proxies": ((*slots, num_classes, dim), self.storage_dtype or dtype),
        }
        if not self.concatenate:
            num_anchors = num_classes if self.loss.anchors_are_proxies else batch_size
            layout |= {
                "past_positive": ((*slots, num_anchors), dtype),
                "past_counted": ((*slots, num_anchors), dtype),
                # [residue, i, a, j]: log-sum-exp of anchor a of slot i over the others of slot j
                "block_lse": ((*slots, num_anchors, self.num_steps), dtype),
            }
        return layout

    def _reserve(self, batch_size: int, device: torch.device) -> None:
        """Allocate the memory for steps of up to `batch_size` embeddings, keeping what it holds."""
        if self.past_labels is not None and batch_size <= self.past_labels.shape[2]:
            return
        for name, (shape, dtype) in self._layout(batch_size).items():
            held, new = getattr(self, name), torch.full(shape, PADDING.get(name, 0), dtype=dtype, device=device)
            if held is not None:
                new[tuple(slice(length) for length in held.shape)] = held
            setattr(self, name, new)

    def _stored(self, embeddings: Tensor, labels: Tensor, proxies: Tensor, copy: bool) -> dict[str, Tensor]:
        """A step as it is stored; copied where the caller or the optimiser may change the tensors in place."""
        dtype = self.storage_dtype or self.dtype
        return {
            "past_embeddings": embeddings.detach().to(dtype, copy=copy),
            "past_labels": labels.clone(),
            "past_proxies": proxies.detach().to(dtype, copy=copy),
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

    # --- saving ------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, str | int]:
        """What a memory must have in common with the module that it is loaded into."""
        num_classes, dim = self.proxies.shape
        return {
            "num_steps (N)": self.num_steps,
            "step_gap (M)": self.step_gap,
            "number of classes (C)": num_classes,
            "embedding dimension (D)": dim,
            "storage_dtype": str(self.storage_dtype or self.dtype),
            "concatenate": self.concatenate,
            "loss": repr(self.loss),  # the cached log-sum-exps hold its scale and margin
        }

    def get_extra_state(self) -> dict:
        return {
            "settings": self._settings(),
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

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Allocates what the state holds, so that a module which has seen no batch yet loads it strictly."""
        extra = state_dict.get(prefix + "_extra_state")
        if extra is not None:
            theirs, ours = extra["settings"], self._settings()
            for setting, value in ours.items():
                if theirs[setting] != value:
                    raise UserError(
                        f"this state of MemVir was saved with {setting} {theirs[setting]}, not {value}; "
                        "build the module with the same settings, or train anew"
                    )
            for name in self._layout(0):
                setattr(self, name, None)
            if prefix + "past_labels" in state_dict:
                self._reserve(state_dict[prefix + "past_labels"].shape[2], self.proxies.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _CombinedWithPast(torch.autograd.Function):
    """The loss of all anchors, current and past, and the log-sum-exps of the two new strips, (A, n) and (n, A).

    The gradients are taken here at once, by hand: the strips are turned into their gradients in place, they are gone
    when forward returns, and nothing is kept for backward that later steps overwrite.
    """

    @staticmethod
    def forward(
        ctx,
        loss: ProxyLoss,
        own: Tensor,  # (A,)
        positive: Tensor,  # (A,)
        anchors: Tensor,  # (A, D)
        others: Tensor,  # (K, D)
        counted: Tensor,  # (A,)
        block_lse: Tensor,  # (n, A, n), and so on: the same of the past
        past_positive: Tensor,
        past_counted: Tensor,
        past_anchors: Tensor,
        past_others: Tensor,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, num_anchors = len(block_lse), len(own)
        logits = (loss.factor * anchors) @ past_others.T  # (A, D) @ (D, nK) -> (A, nK)
        if padding is not None:
            logits += padding
        right, right_sum, across = _logsumexp(logits.unflatten(1, (n, -1)))  # (A, n, K), (A, n), (A, n)
        logits = past_anchors @ (loss.factor * others).T  # (nA, D) @ (D, K) -> (nA, K)
        below, below_sum, down = _logsumexp(logits)  # (nA, K), (nA,), (nA,)

        # what each of the R = A + nA anchors is compared with, in 1 + n blocks: the current step's others, each slot's
        current = torch.cat([own[:, None], across], 1)  # (A, 1 + n)
        past = torch.cat([down[:, None], block_lse.flatten(0, 1)], 1)  # (nA, 1 + n)
        blocks, blocks_sum, lse = _logsumexp(torch.cat([current, past]))  # (R, 1 + n), (R,), (R,)
        value, by_lse, by_positive = loss.combine(
            lse,
            torch.cat([positive, past_positive.flatten()]),
            torch.cat([counted, past_counted.flatten()]),
        )
        if any(ctx.needs_input_grad):
            # the derivative of a log-sum-exp by a logit is its exponential's share of the sum
            by_block = blocks * (by_lse / blocks_sum)[:, None]  # (R, 1 + n)
            by_logit = loss.factor * by_block
            right *= (by_logit[:num_anchors, 1:] / right_sum)[:, :, None]
            below *= (by_logit[num_anchors:, 0] / below_sum)[:, None]
            ctx.save_for_backward(
                by_block[:num_anchors, 0],
                by_positive[:num_anchors],
                right.flatten(1) @ past_others,  # (A, nK) @ (nK, D) -> (A, D)
                below.T @ past_anchors,  # (K, nA) @ (nA, D) -> (K, D)
            )
        down = down.view(n, -1)
        ctx.mark_non_differentiable(across, down)
        ctx.set_materialize_grads(False)
        return value, across, down

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        return None, *(gradient * derivative for derivative in ctx.saved_tensors), *[None] * 8


def _logsumexp(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last dimension: exp(logits - their maximum), in place of the logits, their sum, and the log-sum-exp.

    torch.logsumexp keeps neither, and allows for infinite logits, of which there are none here.
    """
    maximum = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(maximum).exp_()
    total = exponentials.sum(-1)
    return exponentials, total, total.log().add_(maximum.squeeze(-1))
