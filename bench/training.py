"""Forward and backward of one model under each variant: the check of its rows, then its time."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .measure import Sections, WrongResult, check_close, check_equal, no_collector, reduction_bound
from .rivals import Attach, Keep, first_tensor


@dataclass
class Job:
    """One model and how it is run; all variants hook this same model, so that all run in the same memory."""

    model: nn.Module
    forward: Callable[[], torch.Tensor]  # returns the loss
    leaves: list[torch.Tensor]  # what backward leaves a .grad in: the same to the bit with and without capture
    keep: Keep

    def forget(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        """One forward and backward."""
        self.forget()
        self.forward().backward()


def true_gradients(job: Job) -> list[torch.Tensor]:
    """The gradient with respect to each point's output, from `torch.autograd.grad`."""
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, args, output: outputs.__setitem__(name, first_tensor(output))

    handles = [job.model.get_submodule(name).register_forward_hook(watch(name)) for name in job.keep.points]
    try:
        loss = job.forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(torch.autograd.grad(loss, [outputs[name] for name in job.keep.points]))


def check_variants(job: Job, variants: dict[str, Attach]) -> None:
    """Check the rows of every variant against autograd, and that the model's own gradients stay the same."""
    grads = true_gradients(job)
    job.step()
    own = [leaf.grad for leaf in job.leaves]
    for name, attach in variants.items():
        with attach(job.model, job.keep) as rows:
            for _ in range(2):  # the second step meets what the first has left behind
                job.step()
                for leaf, truth in zip(job.leaves, own, strict=True):
                    check_equal(name, leaf.grad, truth)
                kept = rows()
                if kept is None:  # nothing is kept, as by an empty hook
                    continue
                if len(kept) != len(grads):
                    raise WrongResult(f"{name}: there must be a row for each of {len(grads)} points, got {len(kept)}")
                for point, row, grad in zip(job.keep.points, kept, grads, strict=True):
                    truth, bound = reduction_bound(grad, 1, job.keep.reduce, job.keep.dtype)
                    check_close(f"{name} at {point}", row, truth, bound)


def sampler(job: Job, attach: Attach, n_steps: int, beside: Callable[[], None] | None = None) -> Callable[[], Sections]:
    """What takes one sample: hooks on, one step to warm up, then n_steps timed; seconds a step.

    Sections: forward, backward, free (the graph is let go), total of these, cpu, and waits in backward (a number).
    ``beside`` runs before each timed step (it lets a busy thread go on, say).
    """

    def sample() -> Sections:
        spent = dict.fromkeys(("forward", "backward", "free", "cpu", "waits"), 0.0)
        with attach(job.model, job.keep):
            job.step()
            with no_collector():
                for _ in range(n_steps):
                    job.forget()
                    if beside is not None:
                        beside()
                    cpu, start = time.process_time(), time.perf_counter()
                    loss = job.forward()
                    waits, middle = n_waits(), time.perf_counter()
                    loss.backward()  # type: ignore[no-untyped-call]
                    stop, waits_stop = time.perf_counter(), n_waits()
                    del loss
                    end, cpu_end = time.perf_counter(), time.process_time()
                    spent["forward"] += middle - start
                    spent["backward"] += stop - middle
                    spent["free"] += end - stop
                    spent["cpu"] += cpu_end - cpu
                    spent["waits"] += waits_stop - waits
        spent["total"] = spent["forward"] + spent["backward"] + spent["free"]
        return {section: amount / n_steps for section, amount in spent.items()}

    return sample


def n_waits() -> int:
    """How often this thread has stood still of its own accord until now, waiting for the GIL for one."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if hasattr(resource, "RUSAGE_THREAD") else 0
