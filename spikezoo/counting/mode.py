"""The dispatch mode: sees every operation of a forward pass and looks it up in the table of rules."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spikezoo.counting.observer import Call, Observer, Tally, tensors
from spikezoo.counting.rules import NORMS, TABLE, Rule
from spikezoo.counting.signals import ANALOG, BLANK, UNKNOWN
from spikezoo.observe import evaluating, is_neuron

__all__ = ["CountingMode", "observe"]

_CREATED = ("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.empty", "aten.empty_like", "aten.new_empty")
# Constants, random numbers and questions about a tensor.
_CONSTANT = (
    "ones ones_like new_ones full full_like new_full arange linspace eye scalar_tensor rand rand_like randn randn_like "
    "randint randint_like randperm normal uniform exponential random lift_fresh _local_scalar_dense equal is_nonzero "
    "empty_strided empty_permuted new_empty_strided zero resize set_ _assert_async"
)
_IGNORED = {*_CREATED, *(f"aten.{name}" for name in _CONSTANT.split())}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to do with an operation."""

    kind: str  # view, composite, created, ignored, free, product, torch, none
    rule: Rule | None = None
    writes: bool = False


@functools.cache
def _plan(func: OpOverload) -> _Plan:
    name = str(func._overloadpacket)
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    writes = alias is not None and alias.is_write
    if writes and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name in TABLE:
        kind, rule = TABLE[name]
        return _Plan(kind, rule, writes)
    if name in _IGNORED:
        return _Plan("created" if name in _CREATED else "ignored", writes=writes)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _Plan("composite")  # reaches us whole where a tensor was made in inference mode
    if alias is not None and not writes:
        return _Plan("view")
    if func._overloadpacket in flop_registry:
        return _Plan("torch", writes=writes)
    return _Plan("none", writes=writes)


class CountingMode(TorchDispatchMode):
    """Shows an observer every operation of forward passes."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer
        self.paused = False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        plan, observer = _plan(func), self.observer
        if self.paused or plan.kind == "view":
            return func(*args, **kwargs)
        if plan.kind == "composite":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if plan.kind == "created":
            observer.create(out)
            return out
        live = any(observer.live(t) for t in tensors((*args, *kwargs.values())))
        signal = BLANK
        call = Call(func, args, kwargs, out)
        if plan.kind == "product":
            assert plan.rule is not None
            signal = plan.rule(observer, call)
        elif plan.kind == "free":
            if live:
                assert plan.rule is not None
                signal = plan.rule(observer, call)
                if any(norm in call.name for norm in NORMS):
                    observer.dense(0, out[0].shape[0], norm_elements=out[0].numel())
        elif plan.kind == "torch":
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            first = call.args[0]
            observer.analog(call, None, flops // 2, 0, first.shape[0] if first.dim() else 1)
            signal = ANALOG
        elif plan.kind != "ignored":
            observer.tally.note(str(func))
            signal = UNKNOWN
        for tensor in tensors((out,)):
            observer.record(tensor, signal if live else BLANK, plan.writes)
        return out


_ONE = threading.RLock()  # a model has one set of hooks and modes: threads count one after the other


@contextmanager
def watched(model: nn.Module, mode: CountingMode) -> Iterator[None]:
    """Tell the mode which module runs, and what its neurons put out; of this thread alone."""
    thread = threading.get_ident()

    def enter(name: str, module: nn.Module, args: object) -> None:
        if threading.get_ident() == thread:
            mode.observer.stack.append(name)

    def leave(neuron: bool, name: str, module: nn.Module, args: object, out: object) -> None:
        if threading.get_ident() != thread:
            return
        mode.observer.stack.pop()
        if neuron and isinstance(out, Tensor) and out.dim() > 1:
            mode.paused = True
            mode.observer.fire(name, out, getattr(module, "step_mode", "m") == "s")
            mode.paused = False

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not path:
                continue  # the stack's bottom
            name = path.replace("_orig_mod.", "")
            stack.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
            hook = functools.partial(leave, is_neuron(module), name)
            stack.callback(module.register_forward_hook(hook).remove)
        if is_neuron(model):
            hook = functools.partial(leave, True, type(model).__name__)
            stack.callback(model.register_forward_pre_hook(functools.partial(enter, type(model).__name__)).remove)
            stack.callback(model.register_forward_hook(hook).remove)
        yield


def observe(model: nn.Module, batch: Tensor, inputs: str, observer: Observer) -> Tally:
    """Run one batch under the mode and return its sums."""
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"batch is a {type(batch).__name__}: expected a tensor of images [B, C, H, W] or event frames "
            "[B, T, C, H, W]; of a loader's pair give the images, count(model, images)."
        )
    if batch.dim() < 2 or batch.numel() == 0:
        raise ValueError(
            f"batch of shape {tuple(batch.shape)}: expected at least one image with its batch axis; a single image "
            "needs x.unsqueeze(0)."
        )
    if not batch.is_floating_point():
        raise ValueError(
            f"batch of {batch.dtype}: expected floating-point images, normalised as the model takes them; give "
            "batch.float(). Whole numbers such as 0..255 would pass for spikes: then inputs='analog' too."
        )
    if batch.is_meta or any(p.is_meta for p in model.parameters()):
        raise ValueError("Model or batch is on the meta device, where there are no values: use device='cpu'.")
    T = batch.shape[1] if batch.dim() == 5 else getattr(model, "T", 1)
    mode = CountingMode(observer)
    with _ONE, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # there operations would arrive undivided
        stack.enter_context(torch.no_grad())
        if batch.is_inference():
            batch = batch.clone()
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        stack.enter_context(watched(model, mode))
        observer.begin(batch, inputs, T if isinstance(T, int) and T > 0 else 1)
        stack.enter_context(mode)
        try:
            output = model(batch)
        except (RuntimeError, IndexError, AssertionError) as error:  # timm's layers assert the size
            raise ValueError(
                f"The model does not take a batch of shape {tuple(batch.shape)} and {batch.dtype}: {error}. "
                "Give a batch that model(batch) runs on."
            ) from error
    if output is None:
        raise ValueError(
            f"{type(model).__name__}.forward returned None, so what it computed may not be what it is for: let it "
            "return its output."
        )
    return observer.end()
