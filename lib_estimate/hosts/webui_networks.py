"""A webui's extra networks, such as LoRAs, put in and taken out as it does for its pictures.

Leans on, alike in AUTOMATIC1111 1.10.1 and the Forge family: `extra_networks.parse_prompt`, `activate`, `deactivate`,
`extra_network_registry`, where the webui's own LoRA extension has `lora`, of a module that knows its `networks` with
`loaded_networks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from modules import extra_networks, processing, shared


class Switchable(Protocol):
    """A loaded checkpoint that extra networks can be put into."""

    model: Any

    def switch(self, activate: Callable[[], None]) -> None:
        """Has the webui activate others, so that the next use of the networks is with those."""

    def remembered(self) -> Callable[[], None]:
        """What makes the LoRAs that are active now active again, after the loan."""


class Switch:
    """Which extra networks are at work in a checkpoint on loan."""

    def __init__(self, model: Switchable) -> None:
        self.model = model
        self.now: str | None = None  # None: nobody knows
        self._last: tuple[Any, Any] | None = None

    def to(self, tags: str) -> bool:
        """The extra networks of these tags are at work, and no others; whether that changed anything.

        Where one can't be activated, the webui leaves active what was: so first there are none.
        """
        if tags == self.now:
            return False
        self.now = None
        self.model.switch(lambda: [self.activate(each) for each in ("", tags)])
        self.now = tags
        return True

    def activate(self, tags: str) -> None:
        """As for a picture with these tags in its prompt."""
        self.deactivate()
        _, data = extra_networks.parse_prompt(tags)
        p = processing.StableDiffusionProcessingTxt2Img(sd_model=shared.sd_model, prompt=tags)
        p.prompts, p.all_prompts, p.iteration, p.scripts = [tags], [tags], 0, None
        p.seeds, p.subseeds, p.extra_generation_params = [0], [0], {}
        self._last = p, data
        extra_networks.activate(p, data)

    def deactivate(self) -> None:
        if self._last is not None:
            extra_networks.deactivate(*self._last)
            self._last = None


@contextmanager
def switching(model: Switchable) -> Iterator[Switch]:
    """Around the loan of a checkpoint. Afterwards what was active before is active."""
    give_back, switch = model.remembered(), Switch(model)
    try:
        yield switch
    finally:
        switch.activate("")
        switch.deactivate()
        give_back()


def lora_networks() -> Any:
    """The module of the webui's own LoRA extension that has `loaded_networks`; None where it is switched off."""
    lora = extra_networks.extra_network_registry.get("lora")
    return None if lora is None else getattr(sys.modules[type(lora).__module__], "networks", None)


def remembered_objects(model: Any, load: Callable[[], None]) -> Callable[[], None]:
    """`Switchable.remembered` in the Forge family, where a LoRA is a patcher in place of another. `load` has the webui
    load the patchers that are then there, which is when it works on the weights."""
    objects, applied, networks = model.forge_objects, model.forge_objects_after_applying_lora, lora_networks()
    before, loaded = (
        (model.current_lora_hash, objects.unet, objects.clip),
        list(networks.loaded_networks if networks else ()),
    )

    def give_back() -> None:
        model.forge_objects, model.forge_objects_after_applying_lora = objects, applied
        model.current_lora_hash, objects.unet, objects.clip = before
        if networks is not None:
            networks.loaded_networks[:] = loaded
        load()

    return give_back
