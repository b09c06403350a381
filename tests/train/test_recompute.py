from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from minga.config import ModelConfig, TrainConfig
from minga.config.presets import tiny
from minga.data.packing import MASKED, Batch
from minga.kernels import cpu
from minga.model.attention import LatentAttention, RMSNorm
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter
from minga.train.recompute import recompute
from minga.train.step import batch_loss


def gradients(
    config: ModelConfig, precision: str, *, dropped: bool, watch: Any = None
) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(config).init_weights(residual_scale=1.0).set_precision(precision).train()
    if dropped:
        recompute(model)
    if watch is not None:
        watch(model)
    ids_BL = torch.randint(config.vocab_size, (4, 130))
    targets_KBT = torch.stack([ids_BL[:, 1:129], ids_BL[:, 2:]]).contiguous()
    targets_KBT[0, 1, 5] = targets_KBT[1, 1, 4] = MASKED
    segments_BT = (torch.arange(128) > 70).long().expand(4, -1)
    batch = Batch(ids_BL[:, :128].contiguous(), targets_KBT, segments_BT, None)
    counter = LoadCounter(model.moe_layers())
    run = TrainConfig(steps=1, model=config, precision=precision, router_z_loss=1e-3)
    with_mtp = config.num_nextn_predict_layers > 0
    loss = batch_loss(model, batch, run, counter, with_mtp=with_mtp)[0]
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


CONFIGS = {
    "tiny": tiny(),
    "no query latent": tiny().replace(q_lora_rank=None),
    "qwen3": ModelConfig(
        model_type="qwen3", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_interleave=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "int8", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("compiled", [True, False])
def test_the_gradients_are_the_same_to_the_bit(
    name: str, precision: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        cpu.load()
    else:
        monkeypatch.setattr(cpu, "available", lambda: False)
    loss, grads = gradients(CONFIGS[name], precision, dropped=False)
    loss_again, grads_again = gradients(CONFIGS[name], precision, dropped=True)
    assert loss == loss_again
    assert all(torch.equal(grads[key], grads_again[key]) for key in grads)


@pytest.mark.parametrize("dropped", [False, True])
def test_between_the_passes_the_outputs_are_gone(dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.load()
    kept: list[str] = []

    def leave(name: str, refs: dict[str, StorageWeakRef]) -> Any:
        return lambda module, args, out: refs.__setitem__(name, StorageWeakRef(out.untyped_storage()))

    refs: dict[str, StorageWeakRef] = {}

    def watch(model: Transformer) -> None:
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm) and name.startswith("model.layers"):
                module.register_forward_hook(leave(name, refs))
            elif isinstance(module, LatentAttention):
                module.kv_b_proj.register_forward_hook(leave(f"{name}.kv_b_proj", refs))
        hidden = model.hidden

        def then_look(*args: Any, **options: Any) -> Any:
            out = hidden(*args, **options)
            kept.extend(name for name, ref in refs.items() if not ref.expired())
            return out

        monkeypatch.setattr(model, "hidden", then_look)

    gradients(tiny(), "float32", dropped=dropped, watch=watch)
    assert len(refs) > 10
    assert not kept if dropped else len(kept) > 10


def test_an_evaluation_is_left_alone() -> None:
    model = Transformer(tiny()).init_weights().eval()
    ids_BT = torch.randint(256, (1, 20))
    with torch.no_grad():
        expected = model(ids_BT).logits
        recompute(model)
        assert torch.equal(model(ids_BT).logits, expected)
