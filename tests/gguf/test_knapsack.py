"""Types by cost: sizes kept, the choice against all choices, files of the same bytes, and closer ones."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters.gguf import budget as budgets
from converters.gguf.budget import USUAL
from converters.gguf.convert import convert
from converters.gguf.opened import open_file
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.plan import prepare
from converters.gguf.qtypes import QTYPES
from dsconvert.calibration.request import CalibrationRequest
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, UsageError
from dsconvert.events import Check, Foretold, Planned, TypesChosen
from dsconvert.memory.model import decoder_of
from dsconvert.memory.peak import Card, peak
from dsconvert.memory.runtimes import MIB, RUNTIMES
from dsconvert.proof.types_by_cost import types_by_cost
from dsconvert.quantization.allocate import Option, curve
from dsconvert.quantization.budget import Budget, choose
from dsconvert.quantization.cost_file import Known, load, save

WEIGHTS = 2_622_720  # of the embedded sample


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    """Made-up costs of the sample's tensors, each about a fourth for a bit more, in a file."""
    job = prepare(Options("sample:", budget=Budget(bpw=8), dry_run=True))
    shapes = {n: t.shape for n, t in job.outputs[0].tensors.items() if len(t.shape) > 1}
    rng = random.Random(3)
    nats = {
        name: {kind: rng.uniform(0.5, 2) * 4.0 ** -QTYPES[kind].bits for kind in (*USUAL, "f16")}
        for name in shapes
    }
    save(path := tmp_path / "costs.json", Known(nats, {}), shapes, "imatrix")
    return path


def chosen(asked: Budget, **more: Any) -> tuple[TypesChosen, Planned]:
    options = Options("sample:", budget=asked, dry_run=True, **more)
    events = list(convert(options))
    (types,), (plan,) = ([e for e in events if isinstance(e, kind)] for kind in (TypesChosen, Planned))
    assert isinstance(types, TypesChosen)
    assert isinstance(plan, Planned)
    assert types.nbytes == sum(plan.nbytes)
    return types, plan


def kinds_of(plan: Planned) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in plan.tensors if len(tensor.shape) > 1}


def test_the_choice_is_the_best_of_all() -> None:
    """Four tensors of five types: every choice tried."""
    rng = random.Random(7)
    kinds = ("q2_k", "q3_k", "q4_k", "q6_k", "q8_0")
    shapes = {f"blk.{i}.ffn_up.weight": (rng.randrange(8, 64), 256 * rng.randrange(1, 5)) for i in range(4)}
    nats = {name: {k: rng.uniform(0.3, 3) * 4.0 ** -QTYPES[k].bits for k in kinds} for name in shapes}
    types = dict.fromkeys(shapes, kinds)
    options, weights = budgets.options_of(types, shapes, nats), sum(map(math.prod, shapes.values()))
    least = sum(budgets.tensor_bits(shape, "q2_k") for shape in shapes.values())
    most = sum(budgets.tensor_bits(shape, "q8_0") for shape in shapes.values())
    for bits in range(least, most, (most - least) // 40):
        found = choose(options, weights, bits, "so many bits")
        best = min(
            sum(nats[name][kind] for name, kind in zip(shapes, choice, strict=True))
            for choice in itertools.product(kinds, repeat=4)
            if sum(budgets.tensor_bits(shapes[n], k) for n, k in zip(shapes, choice, strict=True)) <= bits
        )
        assert found.nats == pytest.approx(best, rel=1e-12)
        assert found.bits <= bits
    with pytest.raises(UsageError, match="as small as so many bits"):
        choose(options, weights, least - 8, "so many bits")


def test_the_curve_is_the_hull_of_all_choices() -> None:
    rng = random.Random(1)
    slots = [[Option(rng.randrange(1, 50), rng.random()) for _ in range(4)] for _ in range(4)]
    found = curve(slots)
    points = [
        (sum(o.bits for o in choice), math.fsum(o.error for o in choice))
        for choice in itertools.product(*slots)
    ]
    for bits, error in points:  # none below the line between two corners
        for (b1, e1), (b2, e2) in itertools.pairwise(found):
            if b1 <= bits <= b2:
                assert error >= e1 + (e2 - e1) * (bits - b1) / (b2 - b1) - 1e-9
    for corner, error in found:
        assert any(bits == corner and e == pytest.approx(error) for bits, e in points)
    assert found == sorted(found)


@pytest.mark.parametrize("split", [None, 400_000])
def test_a_file_is_at_most_as_big_as_was_asked(costs: Path, split: int | None) -> None:
    """And uses what it may, to the step of its smallest tensor."""
    for size in (1_150_000, 1_400_001, 1_777_777, 2_345_678):
        types, plan = chosen(Budget(size=size, measurement=costs), split_max_size=split)
        assert 0 <= size - sum(plan.nbytes) < 20_000
        assert types.asked == f"{size:,} bytes"
    for bpw in (3.1, 4.5, 6.789):
        types, plan = chosen(Budget(bpw=bpw, measurement=costs), split_max_size=split)
        data = 8 * sum(tensor.nbytes for tensor in plan.tensors) / WEIGHTS
        assert bpw - 0.05 < data <= bpw
        assert types.bits_per_weight == pytest.approx(data)


def test_more_bytes_never_cost_more(costs: Path) -> None:
    found = [chosen(Budget(size=size, measurement=costs))[0] for size in range(1_200_000, 2_900_000, 170_000)]
    assert all(more.nats < less.nats for less, more in itertools.pairwise(found))
    bytes_, nats = zip(*found[0].curve, strict=True)
    assert list(bytes_) == sorted(bytes_)
    assert list(nats) == sorted(nats, reverse=True)
    for event in found:  # the curve's corners that fit are no better
        assert all(cost >= event.nats * (1 - 1e-9) for size, cost in event.curve if size <= event.nbytes)
    assert {name for name, _, _ in found[0].rules} >= {"q4_0", "q4_k_m", "q6_k", "q2_k"}


def test_types_floor_and_overrides_bound_the_choice(costs: Path) -> None:
    _, plan = chosen(Budget(bpw=5, types=("q4_k", "q6_k"), measurement=costs))
    assert set(kinds_of(plan).values()) == {"q4_k", "q6_k"}
    _, plan = chosen(Budget(bpw=5, floor="q4_0", measurement=costs))
    assert min(QTYPES[kind].bits for kind in kinds_of(plan).values()) == 4.5
    _, plan = chosen(Budget(bpw=7, measurement=costs), overrides=(("output.weight", "f16"),))
    assert kinds_of(plan)["output.weight"] == "f16"
    with pytest.raises(UsageError, match="leaves none"):
        chosen(Budget(bpw=5, types=("q4_k",), floor="q8_0", measurement=costs))
    with pytest.raises(UsageError, match="'q9' is unknown"):
        chosen(Budget(bpw=5, types=("q9",), measurement=costs))
    with pytest.raises(UsageError, match=r"as small as 2 bits per weight"):
        chosen(Budget(bpw=2, measurement=costs))


def test_a_card_holds_the_weights_and_the_context(costs: Path) -> None:
    """The whole file, the cache and what runs, by the formula of `dsconvert memory`."""
    runtime, config = RUNTIMES["llama.cpp"], open_checkpoint("sample:").config
    vram = runtime.fixed + 19 * MIB // 2
    for context in (512, 64):
        types, _ = chosen(Budget(vram=vram, context=context, measurement=costs))
        beside = peak(decoder_of(config), [Card(0, 2, head=True)], runtime, 16, 1, context).total
        assert types.nbytes <= vram - beside
        assert context < 512 or vram - beside - types.nbytes < 20_000
    with pytest.raises(UsageError, match="a context of 1024 tokens does not fit"):
        chosen(Budget(vram=runtime.fixed, measurement=costs))


def test_costs_of_another_model_solver_or_choice_are_refused(costs: Path, tmp_path: Path) -> None:
    known = json.loads(costs.read_text())
    shapes = {name: tuple(shape) for name, shape in known["shapes"].items()}
    types = dict.fromkeys(shapes, ("q4_k",))
    assert load(costs, shapes, types, "imatrix").nats == known["nats"]
    with pytest.raises(CheckpointError, match="another model"):
        load(costs, {**shapes, "output.weight": (1, 256)}, types, "imatrix")
    with pytest.raises(CheckpointError, match="another solver"):
        load(costs, shapes, types, "gptq")
    with pytest.raises(CheckpointError, match=r"no cost of .* in iq4_xs"):
        load(costs, shapes, dict.fromkeys(shapes, ("iq4_xs",)), "imatrix")
    (bad := tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConversionError, match="should hold a JSON object"):
        load(bad, shapes, types, "imatrix")
    for damage in ({"nats": {"a": {"q4_k": -1}}}, {"nats": 3}, {"importance": {"a": ["x"]}}):
        (bad := tmp_path / "bad.json").write_text(json.dumps(known | damage))
        with pytest.raises(CheckpointError, match="not a readable measurement"):
            load(bad, shapes, types, "imatrix")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bpw 4 --size 1M", "two sizes of one file"),
        ("--bpw 4 --quant q4_0 --calib builtin", "--quant has no effect beside --bpw"),
        ("--types q4_k", "--types has no effect without --bpw, --size or --vram"),
        ("--bpw 4 --context 100 --calib builtin", "--context has no effect without --vram"),
        ("--bpw 4", "no text is named"),
        ("--bpw 4 --dry-run", "--dry-run runs nothing"),
        ("--bpw 4 --calib builtin --imatrix x", "contradict"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(words: str, said: str) -> None:
    result = CliRunner().invoke(cli, ["gguf", "sample:", *words.split()])
    assert result.exit_code == 2
    assert said in result.output


def made(out: Path, **more: Any) -> list[Any]:
    few = CalibrationRequest("builtin", samples=4, length=256)
    return list(convert(Options("sample:", outfile=out, calibration=few, **more)))


def kl(events: list[Any]) -> float:
    (value,) = [e.value for e in events if isinstance(e, Check) and e.name == "mean KLD"]
    assert isinstance(value, float)
    return value


def test_a_file_is_closer_than_the_rule_of_its_size_and_the_same_twice(tmp_path: Path) -> None:
    """On the embedded sample, as the proof measures it; the foretold figure is beside the measured one."""
    ruled = made(tmp_path / "ruled.gguf", quants=("q3_k_m",))
    size = (tmp_path / "ruled.gguf").stat().st_size
    asked = Budget(size=size, measurement=tmp_path / "costs.json")
    events = made(out := tmp_path / "out.gguf", budget=asked)
    assert all(event.passed for event in events if isinstance(event, Check))
    assert size - 20_000 < out.stat().st_size <= size
    assert kl(events) < 0.7 * kl(ruled)
    (foretold,) = [event for event in events if isinstance(event, Foretold)]
    assert foretold.measured == kl(events)
    assert 0.7 < foretold.measured / foretold.nats < 2
    keys = open_gguf(out).keys
    assert keys["dsconvert.types.asked"] == f"{size:,} bytes"
    assert keys["dsconvert.types.foretold_kl"] == pytest.approx(foretold.nats)
    assert list(keys["dsconvert.types.candidates"]) == list(USUAL)
    assert len(keys["dsconvert.types.curve_bytes"]) == len(keys["dsconvert.types.curve_kl"])
    said = types_by_cost(open_file(out))
    assert said["types"] == f"by cost for {size:,} bytes, foretold KL {foretold.nats:.3g}"
    assert len(said["other sizes' foretold KL"].split("; ")) > 10
    made(tmp_path / "again.gguf", budget=asked, effort="off")  # with the costs that are kept
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
