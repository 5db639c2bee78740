"""Device memory: laws of tapes and breakdowns, edges, refusals, pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from batchsim.dynamic_scenario import DynamicScenario
from batchsim.errors import InputError
from batchsim.memory import Breakdown, breakdown, need_of, peak_bytes, services, serving, training
from batchsim.memory.allocator import MIB, fits, play
from batchsim.memory.breakdown import DEFINITIONS, largest
from batchsim.memory.overheads import AttentionKernel, Library
from batchsim.memory.services import Service
from batchsim.memory.serving import Serving
from batchsim.memory.tape import Allocate, Tape, Term
from batchsim.memory.training import Training
from batchsim.model import MODELS, SERVICES, TRAINED
from batchsim.report.memory import findings, page, print_memory
from batchsim.scenario import Scenario
from batchsim.training_scenario import TrainingScenario
from batchsim.workload_scenario import FixedWorkload

GB = 10**9
SLACK = 8 * MIB
GPU = Library(
    name="some-gpu", product_workspace=32 * MIB, sorts_embeddings=True, composes_grouped_float=True, context=600 * MIB,
    attention_kernels={"2": AttentionKernel(element=4, row=4)},
)  # fmt: skip
SMALL = TRAINED["llama-160m"]


def training_scenario(**keys: object) -> TrainingScenario:
    given_ = {
        "kind": "training", "name": "a training run", "model": "llama-160m", "profile": "none", "sequence_length": 1024,
        "global_batch": 64, "micro_batch": 8,
    }  # fmt: skip
    return TrainingScenario.model_validate(given_ | keys)


def serving_scenario(**keys: object) -> Scenario:
    workload = FixedWorkload(kind="fixed", num_prompts=64, input_len=512, output_len=128)
    given_ = {"kind": "serving", "name": "a loop", "model": "llama-3.1-8b", "profile": "none", "workload": workload}
    return Scenario.model_validate(given_ | {"max_num_seqs": 32} | keys)


def dynamic_scenario(**keys: object) -> DynamicScenario:
    workload = {"kind": "fixed", "num_prompts": 9, "request_rate": 5.0, "input_len": 300}
    given_ = {"kind": "dynamic", "name": "a service", "model": "bert-base", "profile": "none", "workload": workload}
    return DynamicScenario.model_validate(given_ | keys)


# Laws.


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 40), st.sampled_from([128, 500, 1024]), st.sampled_from(["sgd", "momentum", "adamw"]),
    st.sampled_from(["bf16", "mixed", "fp32"]), st.integers(1, 2),
)  # fmt: skip
def test_training_grows_with_everything(
    batch: int, length: int, optimizer: training.Optimizer, precision: training.Precision, steps: int
) -> None:
    def taken(**changes: object) -> int:
        program = Training(SMALL, length, batch, steps, optimizer, precision, library=GPU)
        return play(training.tape(replace(program, **changes))).allocated  # type: ignore[arg-type]

    # Blocks are up to 1 MiB larger than what was asked for, one more and another less.
    here = taken() - SLACK
    assert here <= taken(micro_batch=batch + 1)
    assert here <= taken(sequence_length=length + 64)
    assert here <= taken(accumulation_steps=steps + 1)
    assert taken(checkpointing="full") <= here + 2 * SLACK
    ranked = [taken(optimizer=name) for name in ("sgd", "momentum", "adamw")]
    assert ranked[0] <= ranked[1] + SLACK <= ranked[2] + 2 * SLACK
    assert taken(precision="bf16") < min(taken(precision="mixed"), taken(precision="fp32"))


@pytest.mark.parametrize("precision", ["bf16", "mixed", "fp32"])
def test_checkpointing_frees_most_activations(precision: training.Precision) -> None:
    program = Training(SMALL, 1024, 8, 1, "sgd", precision, library=GPU)
    kept, freed = (play(training.tape(replace(program, checkpointing=how))).terms for how in ("none", "full"))
    parts: tuple[Term, ...] = ("residual stream", "norms", "attention", "MLP")
    assert sum(freed.get(part, 0) for part in parts) < 0.3 * sum(kept[part] for part in parts)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_training_is_linear_in_the_batch(checkpointing: training.Checkpointing) -> None:
    program = Training(SMALL, 1024, 4, 1, "adamw", "mixed", checkpointing, GPU)
    sizes = [sum(play(training.tape(replace(program, micro_batch=n))).terms.values()) for n in (8, 16, 24)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.005)


def test_states_of_the_optimiser_and_gradients_are_as_large_as_weights() -> None:
    usage = play(training.tape(Training(SMALL, 64, 1, 2, "adamw", "fp32")))
    weights = SMALL.parameters * 4
    assert usage.terms["parameters"] == weights
    assert usage.terms["optimiser state"] == pytest.approx(2 * weights, rel=1e-5)
    # Weights that many micro-batches add to; the embedding's new gradient is there beside its old one.
    assert usage.terms["gradients"] >= weights


def test_kv_cache_in_whole_blocks() -> None:
    shape = MODELS["llama-3.2-3b"]
    usage = play(serving.tape(Serving(shape, 77, 8, 512, 1000, 32, library=GPU)))
    assert usage.terms["KV cache"] == 77 * 32 * shape.kv_bytes_per_token
    assert usage.terms["parameters"] == shape.weight_bytes
    assert usage.terms["workspace"] == 3 * GPU.product_workspace


@pytest.mark.parametrize("graphs", [True, False])
def test_what_runs_beside_the_warm_up_reserves_the_forward_once_more(graphs: bool) -> None:
    # In the graphs' pool, or on the stream of the run.
    program = Service(SERVICES["bert-base"], 32, (512,), graphs, library=GPU)
    usage = play(services.tape(program))
    assert usage.reserved - usage.allocated > 0.9 * usage.terms["activations"]
    twice = play(services.tape(replace(program, instances=2)))
    assert twice.terms["parameters"] == 2 * usage.terms["parameters"]
    assert twice.reserved - usage.reserved > usage.terms["parameters"] + usage.terms["activations"]


@pytest.mark.parametrize(
    ("tape", "workspaces"),
    [
        (training.tape(Training(SMALL, 64, 1, 2, library=GPU)), 2),  # forward, and autograd's thread
        (training.tape(Training(SMALL, 64, 1, 2, checkpointing="full", library=GPU)), 2),
        (services.tape(Service(SERVICES["resnet-50"], 4, library=GPU)), 2),  # warm-up, and capture
        (services.tape(Service(SERVICES["bert-base"], 4, (64,), False, 3, GPU)), 4),  # warm-up, and three runs
        (serving.tape(Serving(MODELS["llama-3.2-1b"], 9, 4, 64, 100, library=GPU)), 3),
    ],
)  # fmt: skip
def test_each_thread_and_stream_that_multiplies_has_a_workspace(tape: Tape, workspaces: int) -> None:
    taken = [event for event in tape.events if isinstance(event, Allocate) and event.term == "workspace"]
    assert sum(event.size == GPU.product_workspace for event in taken) == workspaces


# Scenarios.


def every_kind(**library: object) -> list[Breakdown]:
    kinds = (
        training_scenario(), training_scenario(checkpointing="full", precision="bf16"), serving_scenario(),
        serving_scenario(workload={"kind": "fixed", "num_prompts": 99, "input_len": 900, "output_len": 20,
                                   "request_rate": 3.0}),
        serving_scenario(kv_cache_bytes=5 * GB), dynamic_scenario(), dynamic_scenario(instances=3),
        dynamic_scenario(model="resnet-50", cuda_graphs=False),
    )  # fmt: skip
    return [breakdown(scenario, 24 * GB, GPU) for scenario in kinds]


def test_the_peak_is_the_breakdowns_total() -> None:
    for batch in (2, 64):
        scenario = training_scenario(micro_batch=batch)
        found = breakdown(scenario, 24 * GB, GPU)
        assert peak_bytes(scenario, 24 * GB, GPU) == found.total_bytes
        assert (found.total_bytes <= 24 * GB) == found.fits == (batch == 2)


def test_terms_add_up_and_are_explained() -> None:
    for found in every_kind():
        assert found.total_bytes == sum(found.terms.values()) == found.reserved_bytes + GPU.context
        assert found.allocated_bytes <= found.reserved_bytes
        assert found.fits == (found.total_bytes <= found.device_bytes)
        assert list(found.terms) == [term for term in DEFINITIONS if term in found.terms]
        assert json.loads(json.dumps(found.to_json()))["terms"] == found.terms


@pytest.mark.parametrize(
    "scenario",
    [
        training_scenario(), training_scenario(checkpointing="full"), training_scenario(precision="bf16"),
        serving_scenario(), dynamic_scenario(max_batch_size=8),
    ],
)  # fmt: skip
def test_the_largest_fits_and_one_more_does_not(scenario: TrainingScenario | Scenario | DynamicScenario) -> None:
    device = (2 if isinstance(scenario, DynamicScenario) else 30) * GB
    found = breakdown(scenario, device, GPU)
    need = need_of(scenario, device, GPU)
    assert found.largest is not None
    assert fits(need.tape_of(found.largest), device - need.framework)
    assert not fits(need.tape_of(need.next(found.largest)), device - need.framework)
    for change, batch in found.relief.items():
        assert batch > found.largest
        assert fits(need.relief[change](batch), device - need.framework)
    assert found.wall in found.terms


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(-5, 2000))
def test_largest_is_the_edge_wherever_the_search_begins(edge: int, most: int, guess: int) -> None:
    assert largest(lambda batch: batch <= edge, most, guess) == min(edge, most)


def test_a_global_batch_that_needs_no_accumulation_may_fit_where_less_does_not() -> None:
    # One micro-batch keeps no gradients while it goes forward.
    assert largest(lambda batch: batch <= 3 or batch == 8, 8) == 8


def test_what_does_not_fit_is_refused_with_its_largest_terms() -> None:
    found = breakdown(training_scenario(model="llama-1.3b", micro_batch=64), 80 * GB, GPU)
    with pytest.raises(InputError) as caught:
        found.check()
    sentence = caught.value.within("train.yaml").sentence
    ranked = sorted(found.terms, key=lambda term: -found.terms[term])
    assert sentence.startswith("train.yaml: micro_batch: found 64, which takes ")
    assert all(term in sentence for term in ranked[:4])
    assert f"wanted at most {found.largest}, what fits the device's 80 GB" in sentence
    assert "with checkpointing = full " in sentence
    assert "\n" not in sentence
    breakdown(training_scenario(), 80 * GB, GPU).check()


def test_a_model_too_large_for_any_batch() -> None:
    found = breakdown(training_scenario(model="llama-1.3b", micro_batch=1), 8 * GB, GPU)
    assert found.largest == 0
    with pytest.raises(InputError, match="wanted a smaller model, what fits the device's 8 GB"):
        found.check()


def test_requests_that_take_turns_fit_as_long_as_one_does() -> None:
    rate = {"kind": "fixed", "num_prompts": 5000, "input_len": 3000, "output_len": 100, "request_rate": 9.0}
    scenario = serving_scenario(workload=rate, max_num_seqs=4000, max_num_batched_tokens=8192)
    found = breakdown(scenario, 40 * GB, GPU)
    assert found.fits and found.largest is not None and found.largest < 4000
    assert any("take turns" in sentence for sentence in findings(found))


def test_a_table_of_service_times_has_no_model() -> None:
    scenario = dynamic_scenario(model=None, profile=None, costs={"kind": "table", "batch_ms": {1: 4.0, 8: 9.0}})
    with pytest.raises(InputError, match="a table says nothing of memory"):
        breakdown(scenario, 24 * GB, GPU)


# Pictures.


def test_table_and_page_tell_every_term() -> None:
    for found in every_kind():
        console = Console(width=100, record=True, file=io.StringIO())
        print_memory(console, found)
        text, html = console.export_text(), page(found, {"name": found.title})
        for term, size in found.terms.items():
            assert term in text and term in html
            assert f"{size / 1e9:,.3f}" in text
        assert "|" in text or found.fits
        assert html.count("<!DOCTYPE html>") == 1
