"""Scenarios of training: what they hold, what is refused and how, and the closed form of the critical batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from batchsim.errors import InputError
from batchsim.training_profile import load_training_profile
from batchsim.training_scenario import CriticalBatch, load, parse
from tests.training_profiles import small_training_profile, training

LEAST = """
kind: training
name: small
model: tiny
profile: small
sequence_length: 128
global_batch: 24
micro_batch: 8
"""


def refused(text: str, *sets: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text, "file.yaml", sets)
    return str(caught.value)


class TestScenario:
    def test_defaults(self) -> None:
        found = parse(LEAST)
        assert (found.accumulation_steps, found.step_tokens) == (3, 24 * 128)
        assert (found.optimizer, found.precision, found.checkpointing) == ("adamw", "mixed", "none")
        assert (found.schedules, found.steps, found.data.prepare_ms_per_sequence) == (("sync", "async"), 20, None)

    @pytest.mark.parametrize(
        ("micro", "nearest"), [("7", "6 or 8"), ("5", "4 or 6"), ("25", "24"), ("48", "24"), ("9", "8 or 12")]
    )
    def test_a_micro_batch_that_does_not_divide_is_told_the_nearest_that_do(self, micro: str, nearest: str) -> None:
        told = refused(LEAST, f"micro_batch={micro}")
        assert told == (
            f"--set: micro_batch: found {micro}, which does not divide global_batch = 24, "
            f"wanted a divisor of it; the nearest: {nearest}"
        )

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("model=llama", "wanted llama-160m"),
            ("optimizer=adam", "the nearest: adamw"),
            ("precision=fp16", "bf16"),
            ("checkpointing=some", "none or full"),
            ("schedules=[sync, tile]", "sync or async"),
            ("schedules=[sync, sync]", "sync twice"),
            ("steps=0", "found 0"),
            ("sequence_length=many", "the string 'many'"),
            ("micro_bach=4", "wanted micro_batch"),
            ("gradient_accumulation_steps=4", "global_batch / accumulation_steps"),
            ("batch_size=4", "global_batch and micro_batch"),
            ("data={prepare_ms: 3}", "data.prepare_ms_per_sequence"),
            ("data={prepare_ms_per_sequence: -1}", "found -1"),
            ("critical_batch={critical_batch_tokens: 1e6}", "neither min_steps nor min_tokens"),
            (
                "critical_batch={critical_batch_tokens: 1e6, min_steps: 1e3, min_tokens: 1e9}",
                "min_steps beside min_tokens",
            ),
        ],
    )
    def test_a_mistake_is_told_in_one_sentence(self, change: str, told: str) -> None:
        text = refused(LEAST, change)
        assert told in text
        assert len(text.splitlines()) == 1

    def test_the_kind_of_another_command_is_named(self) -> None:
        assert "batchsim run" in refused(LEAST, "kind=serving")

    def test_constructed_directly(self) -> None:
        with pytest.raises(ValidationError):
            training(micro_batch=3)

    def test_the_shipped_scenario_is_read(self) -> None:
        found = load(Path(__file__).parents[1] / "scenarios" / "training_1b_h200.yaml")
        assert found.critical_batch is not None and found.global_batch % found.micro_batch == 0


class TestProfile:
    def test_what_is_written_is_read_again(self, tmp_path: Path) -> None:
        profile = small_training_profile()
        (tmp_path / "own.json").write_text(profile.model_dump_json(), encoding="utf-8")
        assert load_training_profile("own.json", tmp_path) == profile

    def test_an_unknown_one_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"batchsim calibrate --training"):
            load_training_profile("nowhere", tmp_path)

    def test_a_broken_one_names_its_key(self, tmp_path: Path) -> None:
        (tmp_path / "own.json").write_text(small_training_profile().model_dump_json().replace("layers", "leyers"))
        with pytest.raises(InputError, match="layers"):
            load_training_profile("own.json", tmp_path)


sizes = st.floats(1e2, 1e9)


class TestCriticalBatch:
    """McCandlish et al. 2018, equations 2.11 and 5.1: (S / S_min - 1) (E / E_min - 1) = 1."""

    @given(sizes, sizes, sizes)
    def test_steps_and_tokens_lie_on_the_hyperbola(self, critical: float, least: float, batch: float) -> None:
        known = CriticalBatch(critical_batch_tokens=critical, min_steps=least)
        steps, tokens = known.steps(batch), known.tokens(batch)
        over_steps, over_tokens = critical / batch, batch / critical
        assert steps == pytest.approx(least * (1 + over_steps))
        assert tokens == pytest.approx(least * critical * (1 + over_tokens))
        assert over_steps * over_tokens == pytest.approx(1)

    @given(sizes, sizes, sizes)
    def test_least_tokens_are_least_steps_of_critical_batches(
        self, critical: float, least: float, batch: float
    ) -> None:
        by_steps = CriticalBatch(critical_batch_tokens=critical, min_steps=least)
        by_tokens = CriticalBatch(critical_batch_tokens=critical, min_tokens=least * critical)
        assert by_tokens.steps(batch) == pytest.approx(by_steps.steps(batch))

    def test_at_the_critical_batch_both_are_twice_their_least(self) -> None:
        known = CriticalBatch(critical_batch_tokens=1e6, min_steps=5e3)
        assert (known.steps(1e6), known.tokens(1e6)) == (1e4, 1e10)
