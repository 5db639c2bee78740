"""The real trainer on the CPU: accumulated gradients are those of the whole batch, and it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchsim.model import TRAINED
from calibration.training.trainer import Checkpointing, Optimizer, Precision, Trainer, random_tokens

TINY = TRAINED["tiny"]
TOKENS = random_tokens(8, 24, TINY.vocab_size, "cpu")


def gradients(parts: int, precision: Precision = "fp32", checkpointing: Checkpointing = "none") -> dict[str, Tensor]:
    """Of one optimiser step over `TOKENS` cut into `parts`, by parameter."""
    trainer = Trainer(TINY, "cpu", precision=precision, checkpointing=checkpointing, seed=3)
    for tokens in TOKENS.chunk(parts):
        trainer.backward(trainer.forward(tokens, parts))
    return {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}


class TestGradients:
    @pytest.mark.parametrize("parts", [2, 4, 8])
    def test_accumulated_ones_are_those_of_the_whole_batch(self, parts: int) -> None:
        whole, accumulated = gradients(1), gradients(parts)
        assert whole.keys() == accumulated.keys() == dict(Trainer(TINY, "cpu").model.named_parameters()).keys()
        for name, expected in whole.items():
            assert (accumulated[name] - expected).norm() <= 1e-5 * expected.norm(), name

    @pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
    def test_checkpointing_changes_none(self, precision: Precision) -> None:
        plain, full = gradients(2, precision), gradients(2, precision, "full")
        assert all(torch.equal(plain[name], full[name]) for name in plain)

    def test_mixed_precision_is_close_to_full(self) -> None:
        exact, mixed = gradients(1), gradients(1, "mixed")
        for name, expected in exact.items():
            assert mixed[name].dtype == torch.float32
            assert (mixed[name] - expected).norm() <= 0.05 * expected.norm(), name

    def test_the_loss_is_the_cross_entropy_of_the_next_token(self) -> None:
        trainer = Trainer(TINY, "cpu", precision="fp32")
        with torch.no_grad():
            logits = trainer.model.logits(trainer.model.hidden(TOKENS[:, :-1], torch.float32))
        chances = logits.double().log_softmax(-1).gather(-1, TOKENS[:, 1:, None])
        assert float(trainer.forward(TOKENS).detach()) == pytest.approx(-float(chances.mean()), rel=1e-5)

    def test_no_token_sees_a_later_one(self) -> None:
        model = Trainer(TINY, "cpu", precision="fp32").model
        changed = TOKENS.clone()
        changed[:, 12] = (changed[:, 12] + 1) % TINY.vocab_size
        before, after = (model.hidden(tokens[:, :-1], torch.float32) for tokens in (TOKENS, changed))
        assert torch.equal(before[:, :12], after[:, :12])
        assert not torch.equal(before[:, 12:], after[:, 12:])


class TestLearning:
    @pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
    def test_the_loss_falls(self, optimizer: Optimizer) -> None:
        trainer = Trainer(TINY, "cpu", optimizer=optimizer)
        losses = [trainer.step(TOKENS.chunk(2)) for _ in range(6)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] == pytest.approx(float(torch.tensor(float(TINY.vocab_size)).log()), rel=0.05)

    def test_gradients_are_freed_after_a_step(self) -> None:
        trainer = Trainer(TINY, "cpu")
        trainer.step([TOKENS])
        assert all(weight.grad is None for weight in trainer.model.parameters())

    @pytest.mark.parametrize("precision", ["bf16", "mixed", "fp32"])
    def test_state_is_kept_in_the_precision_of_the_weights(self, precision: Precision) -> None:
        trainer = Trainer(TINY, "cpu", precision=precision)
        trainer.step([TOKENS])
        kept = torch.bfloat16 if precision == "bf16" else torch.float32
        for weight in trainer.model.parameters():
            state = trainer.optimizer.state[weight]
            assert weight.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == kept

    def test_the_shape_is_the_one_that_the_library_counts(self) -> None:
        for shape in (TINY, TRAINED["llama-160m"]):
            with torch.device("meta"):
                from calibration.training.trainer import Llama

                model = Llama(shape)
            assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
