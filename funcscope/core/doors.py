"""The door for models: which modules become functions, which of their parameters make up theta, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod

from .imported import is_compiled, is_dtensor, layer_names
from .remat import remat
from .skeleton import closed_over, make_skeleton

Remat = Literal["none", "layer"] | Iterable[str]
Trainable = Literal["all"] | Iterable[str] | Callable[[str], bool] | None


def unwrapped(model: Any) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`; refuses what is no Python module."""
    while isinstance(model, (DataParallel, DistributedDataParallel)) or is_compiled(model):
        model = model._orig_mod if is_compiled(model) else model.module
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"`model` must be a `torch.nn.Module` with its weights, got {what}: make one and load the weights into it "
            "(`load_state_dict`, or `from_pretrained` for a folder)."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"`model` is scripted or traced ({type(model).__name__}), and its parameters are out of reach of torch.func: "
            "pass the Python module that it was made of."
        )
    _check_state(model)
    return model


def skeleton_of(model: nn.Module, attention: str, dtype: torch.dtype | None) -> nn.Module:
    """`make_skeleton` without backward hooks, which see gradients and are no part of the function."""
    try:
        skeleton = make_skeleton(model, attention, dtype)
    except (TypeError, pickle.PickleError) as err:
        raise TypeError(
            f"the module tree cannot be copied ({err}): {_uncopied(model)} holds something that belongs to this process, "
            "such as a lock, a file or a generator. Delete the attribute, or make it when it is used."
        ) from err
    for module in skeleton.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":  # of transformers, for checkpointing
                del module._forward_hooks[key]
    return skeleton


def running(skeleton: nn.Module, buffers: Mapping[str, torch.Tensor], apart: Iterable[str] = ()) -> nn.Module:
    """A copy that may be called and that holds these buffers themselves; what was compiled runs as it was written.

    apart: names of the modules whose insides no graph keeps.
    """
    memo: dict[int, Any] = {id(param): param for param in skeleton.parameters()}  # without values, and always replaced
    memo |= {id(own): buffers[name] for name, own in skeleton.named_buffers()}
    module = copy.deepcopy(skeleton, memo)
    part: Any
    for part in module.modules():
        if is_compiled(part):
            part.forward = part._orig_mod.__call__
    for name in apart:
        _rematerialise(module.get_submodule(name))
    return module


def _rematerialise(part: nn.Module) -> None:
    """Its forward pass becomes `remat` of a twin's, on the weights that the part holds at the call."""
    own = {id(x): x for x in (*part.parameters(), *part.buffers())}
    twin = copy.deepcopy(part, dict[int, Any](own))
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()  # they run around the part

    def run(state: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        return functional_call(twin, state, args, kwargs)

    call = remat(run)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call({**dict(part.named_parameters()), **dict(part.named_buffers())}, args, kwargs)

    part.forward = forward  # type: ignore[method-assign]


def remat_names(model: nn.Module, chosen: Remat) -> tuple[str, ...]:
    """Which modules to rematerialise: those named, or the layers of a model of transformers.

    A list of modules, which is never called itself, stands for its members.
    """
    if isinstance(chosen, str) and chosen == "none":
        return ()
    if isinstance(chosen, str) and chosen == "layer":
        if names := layer_names(model):
            return names
        raise ValueError(
            f"the layers of {type(model).__name__} are not known: name its modules, "
            f"`fs.functional(model, remat={_called_names(model)})`."
        )
    if isinstance(chosen, str):
        raise ValueError(f'`remat` must be "none", "layer" or names of modules, got {chosen!r}.')
    names, known = tuple(dict.fromkeys(chosen)), dict(model.named_modules())
    if unknown := [name for name in names if name not in known or not name]:
        raise ValueError(f"`remat` names modules that the model does not have: {unknown[:3]}.")
    if nested := [name for name in names if any(name.startswith(f"{other}.") for other in names)]:
        raise ValueError(f"`remat` names `{nested[0]}` and a module that it is a part of: name one of them.")
    if empty := [name for name in names if not any(_called(name, known[name]))]:
        raise ValueError(
            f"`remat` names `{empty[0]}`, a {type(known[empty[0]]).__name__} that is never called and holds no module that "
            f"is: nothing would be computed again. Name modules that are called, such as {_called_names(model)}."
        )
    members = [each for name in names for each in _called(name, known[name])]
    return tuple({id(model.get_submodule(name)): name for name in members}.values())


def _called(name: str, part: nn.Module) -> Iterator[str]:
    """The module itself where it has a forward pass; else, as in a list of modules, those within it that have one."""
    if "forward" in vars(part) or type(part).forward is not nn.Module.forward:
        yield name
        return
    for child, each in part.named_children():
        yield from _called(f"{name}.{child}", each)


def _called_names(model: nn.Module) -> list[str]:
    """What may be named: the list of modules with most parameters, else the first modules that are called and have any."""
    parts = {name: part for name, part in model.named_modules() if name and next(part.parameters(), None) is not None}
    called = {name: [*_called(name, part)] for name, part in parts.items()}
    lists = [name for name, members in called.items() if members and members != [name]]
    sizes = {name: sum(param.numel() for param in parts[name].parameters()) for name in lists}
    return [max(lists, key=sizes.__getitem__)] if lists else [name for name, members in called.items() if members][:2]


def selector(model: nn.Module, trainable: Trainable) -> Callable[[str], bool]:
    """Which names make up theta; see `functional`."""
    names = {name for name, _ in model.named_parameters()}
    if trainable is None:
        chosen = {name for name, param in model.named_parameters() if param.requires_grad}
    elif trainable == "all":
        chosen = names
    elif isinstance(trainable, str):
        raise TypeError(f'`trainable` takes "all", a list of names or a predicate, got the string {trainable!r}.')
    elif callable(trainable):
        chosen = {name for name in names if trainable(name)}
    else:
        chosen = set(trainable)
        if unknown := sorted(chosen - names):
            raise ValueError(f"`trainable` names parameters that the model does not have: {unknown[:3]}.")
    if not chosen:
        raise ValueError(
            f"`trainable={trainable!r}` selects none of the model's {len(names)} parameters: "
            'theta would be empty. Pass `trainable="all"` for a model with frozen weights.'
        )
    return chosen.__contains__


def check_parameters(model: nn.Module, keep: Callable[[str], bool], explicit: bool) -> None:
    """Each has values, on one device, in memory of its own, and those of theta are real numbers."""
    check_whole(model)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"the model is spread over {', '.join(sorted(map(str, devices)))}: move it to one device.")
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(f"`{name}` is on the meta device and has no values: load the weights first.")
        if not param.is_floating_point() and (keep(name) or not explicit):
            raise TypeError(
                f"`{name}` is a parameter of dtype {param.dtype}; theta holds real floating-point numbers only. "
                "Dequantise it, register it as a buffer, or name the parameters of theta by `trainable`."
            )
    _check_aliases(model)


def check_whole(model: nn.Module) -> None:
    """Parameters are not spread over ranks already, by a library whose forward pass gathers them."""
    if name := next((name for name, param in model.named_parameters() if is_dtensor(param)), None):
        raise ValueError(
            f"`{name}` is a DTensor, and the model's forward pass, as `fully_shard` or `parallelize_module` leaves it, is no "
            "function of theta: make the same model on the meta device (`with torch.device('meta')`), and take "
            "`fs.sharded_functional(meta_model, fs.processes(), state={**dict(model.named_parameters()), "
            "**dict(model.named_buffers())})`, which keeps the rows where they are."
        )


def _check_aliases(model: nn.Module) -> None:
    """Two tensors on one memory would be two independent coordinates here and one in the caller's model."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.layout is torch.strided and tensor.numel():
            start = tensor.storage_offset() * tensor.element_size()
            extent = 1 + sum((n - 1) * step for n, step in zip(tuple(tensor.shape), tensor.stride(), strict=True))
            span = (int(start), int(start + extent * tensor.element_size()), name)
            spans.setdefault(tensor.untyped_storage().data_ptr(), []).append(span)
    parameters = {name for name, _ in model.named_parameters()}
    for shared in spans.values():
        for (_, end, first), (start, _, second) in zip(sorted(shared), sorted(shared)[1:], strict=False):
            if start < end and {first, second} & parameters:
                raise ValueError(
                    f"`{first}` and `{second}` share memory without being one parameter. Tie them by assigning the same "
                    "`nn.Parameter` object to both modules, or clone one of them."
                )


def _check_state(model: nn.Module) -> None:
    """Modules that are not ready, or that make their weights anew in a hook before every call."""
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise ValueError(f"`{name}` has no shape yet: run the lazy module on one batch before `functional`.")
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                raise ValueError(
                    f"`{name}.{hook._tensor_name}` is pruned by a hook that makes it from a mask at every call: make it "
                    f"permanent with `torch.nn.utils.prune.remove(module, {hook._tensor_name!r})`, on a copy if need be."
                )
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if held := [cell for hook in hooks for cell in closed_over(hook) if isinstance(cell, nn.Parameter)]:
            raise ValueError(
                f"a forward hook of `{name or type(module).__name__}` holds a parameter of shape {tuple(held[0].shape)} in "
                "its closure, which would stay as it is: make it a method of a module that owns the parameter."
            )


def _uncopied(model: nn.Module) -> str:
    """The first attribute that cannot be copied."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value)
                except (TypeError, RuntimeError, pickle.PickleError):
                    return f"`{f'{name}.{attribute}'.lstrip('.')}`"
    return "a part of it"
