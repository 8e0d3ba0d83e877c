"""Extra networks for the webuis' stand-ins: `modules.extra_networks`, and the LoRAs of each webui's own extension.

A LoRA's file names the layers of the stand-in's own U-Net, and of a text encoder's `encoder`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lib_estimate.prompt import schedule

# ---- modules.extra_networks ---------------------------------------------------------------------------------------

extra_network_registry: dict[str, Any] = {}


class ExtraNetworkParams:
    """What is written in a tag."""

    def __init__(self, items=None):
        self.items = items


def parse_prompt(prompt):
    text, tags = schedule.extra_network_tags(prompt)
    found: dict[str, list] = {}
    for tag in tags:
        kind, *items = tag.strip("<>").split(":")
        found.setdefault(kind, []).append(ExtraNetworkParams(items))
    return text, found


def activate(p, extra_network_data):
    for name, network in extra_network_registry.items():
        network.activate(p, extra_network_data.get(name, []))


def deactivate(p, extra_network_data):
    for network in extra_network_registry.values():
        network.deactivate(p)


# ---- the extension for LoRAs --------------------------------------------------------------------------------------

networks = ModuleType("networks")
networks.loaded_networks, networks.available_network_aliases = [], {}


class ExtraNetworkLora:
    """`<lora:name:weight>`."""

    def activate(self, p, params_list):
        assert isinstance(p.all_prompts, list)  # the real one writes into what a generation has there
        p.extra_generation_params["Lora hashes"] = ""
        names = [params.items[0] for params in params_list]
        weights = [float(params.items[1]) if len(params.items) > 1 else 1.0 for params in params_list]
        networks.load_networks(names, weights, weights, [None] * len(names))

    def deactivate(self, p):
        pass


def list_available_networks() -> None:
    from modules import shared

    files = Path(shared.cmd_opts.lora_dir).glob("*.safetensors")
    networks.available_network_aliases = {file.stem: SimpleNamespace(filename=str(file)) for file in files}


def layers(unet: nn.Module, texts: list[nn.Module]) -> Iterator[tuple[str, str, nn.Module]]:
    """As files of LoRAs name the layers: (lora_unet or lora_te, name, layer)."""
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield "lora_unet", f"lora_unet_{name.replace('.', '_')}", module
    for number, text in enumerate(texts, 1):
        begins = "lora_te" if len(texts) == 1 else f"lora_te{number}"
        for name, module in text.named_modules():
            within = re.search(r"\bencoder\.layers\..*", name)
            if within and isinstance(module, nn.Linear):
                yield "lora_te", f"{begins}_text_model_{within[0].replace('.', '_')}", module


def changes(file: str) -> dict[str, Tensor]:
    """What a LoRA of weight 1 adds to the weights of each layer."""
    parts = safetensors.torch.load_file(file)
    downs = {key.removesuffix(".lora_down.weight"): rows for key, rows in parts.items() if "lora_down" in key}
    return {
        name: parts[f"{name}.lora_up.weight"] @ down * (parts[f"{name}.alpha"] / len(down))
        for name, down in downs.items()
    }


def install(load_networks: Callable[..., None], **more: Any) -> None:
    """Puts in the extension with a webui's own way to have LoRAs at work."""
    from modules import shared

    sys.modules["networks"] = networks
    networks.__dict__.update(more, load_networks=load_networks, list_available_networks=list_available_networks)
    shared.cmd_opts.lora_dir = tempfile.mkdtemp()
    extra_network_registry["lora"] = ExtraNetworkLora()


# ---- AUTOMATIC1111's way: in place, when a layer is used ----------------------------------------------------------


def install_in_layers(unet: nn.Module, texts: list[nn.Module]) -> None:
    for module in unet.modules():
        module.network_layer_name = ""  # as in the real one, also of what has no weights
    for begins, name, module in layers(unet, texts):
        module.network_layer_name, module._begins = name, begins
        module.register_forward_pre_hook(lambda module, _: network_apply_weights(module))
    install(load_into_list, network_apply_weights=network_apply_weights)
    from modules import shared

    shared.opts.lora_functional = False


def load_into_list(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    networks.loaded_networks.clear()
    for name, te, unet, dyn in zip(names, te_multipliers, unet_multipliers, dyn_dims, strict=True):
        if name not in networks.available_network_aliases:
            continue
        file = networks.available_network_aliases[name].filename
        networks.loaded_networks.append(
            SimpleNamespace(name=name, te_multiplier=te, unet_multiplier=unet, dyn_dim=dyn, modules=changes(file))
        )


@torch.no_grad()
def network_apply_weights(self):
    if getattr(self, "network_layer_name", None) is None:
        return
    loaded = networks.loaded_networks
    wanted = tuple((each.name, each.te_multiplier, each.unet_multiplier, each.dyn_dim) for each in loaded)
    if getattr(self, "network_current_names", ()) == wanted:
        return
    if not hasattr(self, "_backup"):
        self._backup = self.weight.clone()
    self.weight.copy_(self._backup)
    for each in loaded:
        if self.network_layer_name in each.modules:
            strength = each.te_multiplier if self._begins == "lora_te" else each.unet_multiplier
            self.weight.add_(strength * each.modules[self.network_layer_name])
    self.network_current_names = wanted


# ---- Forge's way: patchers, whose model is changed when they are loaded -------------------------------------------


class LoraLoader:
    """What LoRAs have done to the weights of a model."""

    def __init__(self, model):
        self.model, self.backup, self.loaded_hash = model, {}, str([])

    @torch.inference_mode()
    def refresh(self, lora_patches):
        if str(list(lora_patches)) == self.loaded_hash:
            return
        for module, weight in self.backup.items():
            module.weight = weight
        self.backup = {}
        for patches in lora_patches.values():
            for module, change in patches.items():
                self.backup.setdefault(module, module.weight)
                module.weight = nn.Parameter(module.weight + change, requires_grad=False)
        self.loaded_hash = str(list(lora_patches))


def install_in_patchers(model: Callable[[], Any]) -> None:
    """model: gives the checkpoint that is loaded now."""

    def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        here, known = model(), networks.available_network_aliases
        networks.loaded_networks[:] = [SimpleNamespace(name=name) for name in names if name in known]
        wanted = [[known[n].filename, u, t] for n, u, t in zip(names, unet_multipliers, te_multipliers, strict=True)]
        if here.current_lora_hash == str(wanted):
            return
        here.current_lora_hash, objects = str(wanted), here.forge_objects
        objects.unet, objects.clip = here.forge_objects_original.unet, here.forge_objects_original.clip
        for file, of_unet, of_text in wanted:
            parts = changes(file)
            objects.unet, objects.clip = objects.unet.clone(), objects.clip.clone()
            found = layers(objects.unet.model.diffusion_model, list(objects.clip.cond_stage_model.values()))
            by = {"lora_unet": (objects.unet, of_unet), "lora_te": (objects.clip.patcher, of_text)}
            for begins, name, module in found:
                if name in parts:
                    patcher, weight = by[begins]
                    patcher.lora_patches.setdefault((file, weight), {})[module] = weight * parts[name]
        here.forge_objects_after_applying_lora = objects.shallow_copy()

    install(swallowing(load_networks))


def swallowing(load: Callable[..., None]) -> Callable[..., None]:
    """The webui prints the errors of an extra network, and goes on."""

    def loaded(*given: Any) -> None:
        try:
            load(*given)
        except KeyError as error:
            print(f"*** Error activating extra network lora: {error}", file=sys.stderr)

    return loaded
