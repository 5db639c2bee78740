"""A causal language model for transformers' continuous batching: one of the hub, or a Llama shape of random weights."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from batchsim.errors import RunError

if TYPE_CHECKING:
    import torch


def build_model(options: dict[str, Any]) -> Any:
    """The model on its device, in bfloat16 on a GPU; random weights of `seed` unless `model` names one.

    `options` are those of the recipe's command line: `device`, `seed`, `model`, `attention`, and the shape: `layers`,
    `hidden`, `heads`, `kv_heads`, `intermediate`, `vocab`.

    Raises:
        RunError: there is no such device, or the attention does not work on it.
    """
    import torch
    import transformers

    device = _device(options["device"])
    builtin = options["attention"] == "builtin"
    if builtin and device.type != "cuda":
        raise RunError("the built-in attention needs a CUDA GPU; on a CPU choose --attention sdpa")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(options["seed"])
    if options["model"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).to(device)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=options["layers"], hidden_size=options["hidden"], num_attention_heads=options["heads"],
            num_key_value_heads=options["kv_heads"], intermediate_size=options["intermediate"],
            vocab_size=options["vocab"], max_position_embeddings=131072, tie_word_embeddings=False,
        )  # fmt: skip
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if builtin:
        from calibration.recipes.paged_attention import install

        install(model)
    else:
        name = options["attention"]
        model.set_attn_implementation(name if name.startswith("paged|") else f"paged|{name}")
    return model.eval()


def about(model: Any) -> dict[str, Any]:
    """Versions, device and number of parameters, for the report."""
    import torch

    cuda = model.device.type == "cuda"
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def _device(name: str | None) -> torch.device:
    import torch

    there = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if there else "cpu"))
    if device.type == "cuda" and not there:
        raise RunError("no CUDA device was found; run the recipe on a machine with one, or choose --device cpu")
    return device
