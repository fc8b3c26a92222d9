"""What a tensor answers about its device, and how it moves: replacements of methods of torch.Tensor, by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.pretended_gpu.storages import NATIVE_DEVICE, NATIVE_TO, is_gpu, on_gpu
from support.pretended_gpu.streams import gpu

Base: Any = torch._C.TensorBase


class _Move(torch.autograd.Function):
    """A move to the other device; the gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
        ctx.source = tensor.dtype, on_gpu(tensor)
        return gpu().move(tensor, to_gpu, dtype, non_blocking)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        dtype, was_on_gpu = ctx.source
        return gpu().move(grads[0], was_on_gpu, dtype), None, None, None


def _parsed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool, bool]:
    """Device, dtype, non_blocking and copy of the arguments of Tensor.to."""
    rest = list(args)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if rest and isinstance(rest[0], Tensor):
        device, dtype = rest[0].device, rest.pop(0).dtype
    elif rest and isinstance(rest[0], str | torch.device | int) and not isinstance(rest[0], bool):
        device = rest.pop(0)
    elif rest and rest[0] is None:
        rest.pop(0)
    if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
        dtype = rest.pop(0) or dtype
    options = [*rest, False, False]
    return device, dtype, bool(kwargs.get("non_blocking", options[0])), bool(kwargs.get("copy", options[1]))


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to: within a device torch's own, else a counted move."""
    device, dtype, non_blocking, copy = _parsed(args, kwargs)
    native = NATIVE_DEVICE(tensor).type
    to_gpu = is_gpu(device)
    stays = device is None or (native != "meta" and torch.device(device).type != "meta" and to_gpu == on_gpu(tensor))
    options = {key: kwargs[key] for key in ("memory_format",) if key in kwargs}
    if stays:
        return NATIVE_TO(tensor, dtype=dtype or tensor.dtype, copy=copy, **options)  # type: ignore[no-any-return]
    if native == "meta" or torch.device(device).type == "meta":
        target = "cpu" if to_gpu else device
        return NATIVE_TO(tensor, target, dtype or tensor.dtype, copy=copy)  # type: ignore[no-any-return]
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Move.apply(tensor, to_gpu, dtype, non_blocking)  # type: ignore[no-any-return]
    moved: Tensor = gpu().move(tensor.detach(), to_gpu, dtype, non_blocking)
    return moved


def tolist(tensor: Tensor) -> Any:
    """Tensor.tolist, for which the host waits."""
    if device(tensor).type == "cuda":
        gpu().wait("tolist")
    with gpu().unseen():
        return Base.tolist(tensor)


def numpy(tensor: Tensor, **kwargs: Any) -> Any:
    """Tensor.numpy, which takes host memory only."""
    if on_gpu(tensor):
        gpu().counters.violation("numpy() of a tensor on the GPU")
    return Base.numpy(tensor, **kwargs)


def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
    """A copy in pinned memory."""
    if on_gpu(tensor):
        gpu().counters.violation("pin_memory() of a tensor on the GPU")
    with gpu().unseen():
        copy = tensor.clone()
    return gpu().pinned.pin(copy)  # type: ignore[no-any-return]


def new_tensor(tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
    """Tensor.new_tensor, on the tensor's device."""
    device = kwargs.pop("device", tensor.device)
    return torch.tensor(data, **{"dtype": tensor.dtype, **kwargs}).to(device)


def device(tensor: Tensor) -> torch.device:
    """Tensor.device; inside a kernel, which runs on the CPU, the true one."""
    return gpu().device if on_gpu(tensor) and not gpu().inside_kernel else NATIVE_DEVICE(tensor)


METHODS: dict[str, Any] = {
    "device": property(device),
    "is_cuda": property(lambda tensor: device(tensor).type == "cuda"),
    "is_cpu": property(lambda tensor: device(tensor).type == "cpu"),
    "get_device": lambda tensor: gpu().device.index if device(tensor).type == "cuda" else -1,
    "to": to,
    "cpu": lambda tensor, **_: to(tensor, "cpu"),
    "cuda": lambda tensor, *args, **kwargs: to(tensor, gpu().device, **kwargs),
    "tolist": tolist,
    "numpy": numpy,
    "pin_memory": pin_memory,
    "new_tensor": new_tensor,
    "is_pinned": lambda tensor, *_: gpu().pinned.is_pinned(tensor),
}


def by_device(native: Callable[..., Any]) -> Callable[..., Any]:
    """torch._C._group_tensors_by_device_and_dtype, whose groups have the true device."""

    def group(lists: Any, *args: Any) -> Any:
        groups = native(lists, *args)
        return {
            (gpu().device if tensors[0][0] is not None and on_gpu(tensors[0][0]) else device, dtype): (tensors, indices)
            for (device, dtype), (tensors, indices) in groups.items()
        }

    return group


def creating(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, torch.as_tensor: from host data, then moved, for which the host waits."""

    def create(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        if isinstance(data, Tensor) and on_gpu(data) and native.__name__ == "as_tensor":
            return data.to(device or gpu().device, *args, **kwargs)
        if not is_gpu(device):
            return native(data, *args, **kwargs, **({} if device is None else {"device": device}))
        requires_grad = kwargs.pop("requires_grad", False)
        return native(data, *args, **kwargs).to(device).requires_grad_(requires_grad)

    return create


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """torch.nn.functional.one_hot, whose zeros torch creates beyond the reach of a dispatch mode."""
    classes = num_classes if num_classes > 0 else int(tensor.max()) + 1
    return (tensor[..., None] == torch.arange(classes, device=tensor.device)).long()
